"""The plan for a terminal: its choices, the time, and every line of the needed memory and disk."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table

from compressors.calibration.splits import BLOCK_LENGTH
from exporter.estimating.disk import disk_lines
from exporter.estimating.durations import format_duration
from exporter.estimating.estimate import Speeds, describe_time, seconds_by_stage
from exporter.estimating.needs import memory_lines
from exporter.estimating.sizes import format_size
from exporter.hub_headers import holds_headers_alone
from exporter.inspection import parts_read_past
from exporter.planning.compression import described_compression
from exporter.planning.plan import Plan
from exporter.planning.recovery import after_quantizing_name, schedule_of, scope_of
from exporter.publishing.search_figures import described_types
from validate.report.facts import artifact_name

__all__ = ["plan_table"]

_OPEN = (
    "by tensor, from sensitivities that ship with the package: after calibration the search measures this model's, and "
    "decides anew on types, experts and width"
)

_MTP = (
    "the layer that predicts further tokens is kept in GGUF file and saved student, with experts chosen by its own "
    "statistics; recovery does not train it, and no figure of the report depends on it"
)


def plan_table(plan: Plan, speeds: Speeds, free_memory: int) -> RenderableType:
    """Choices above, bytes of the artifacts below, and of the run itself at the end."""
    recipe, teacher, source = plan.recipe, plan.teacher_spec, plan.open_source()
    choices = Table(show_header=False, box=None)
    budget = recipe.budget
    counted = (
        "file size" if budget.kind == "file" else f"memory at run time, context {budget.context}, KV {budget.kv_type}"
    )
    choices.add_row("budget", f"{format_size(budget.bytes)} of {counted}")
    choices.add_row("keeps", described_compression(recipe.compress, teacher))
    if teacher.mtp is not None:
        choices.add_row("MTP", _MTP)
    if plan.search is not None:
        choices.add_row("types", _OPEN)
    for number, line in enumerate(_recovery(plan)):
        choices.add_row("" if number else "recovery", line)
    for number, deviation in enumerate(plan.deviations):
        choices.add_row("" if number else "differs", f"{artifact_name(deviation.artifact)}: {deviation.what}")
    for number, note in enumerate(source.notes):
        choices.add_row("" if number else "note", note)
    for number, part in enumerate(parts_read_past(source)):
        choices.add_row("" if number else "read past", part)
    if holds_headers_alone(plan.source):
        choices.add_row("download", _download(plan))
    if plan.mixture:
        choices.add_row("calibration", plan.mixture)
    choices.add_row("time", describe_time(seconds_by_stage(plan, speeds, free_memory)))
    disk, memory = disk_lines(plan), memory_lines(teacher, plan.student_spec, source.storage_type.itemsize)
    return Group(
        choices, "", _sizes(plan), "", _lines("work on disk, at most", disk), "", _lines("memory, at least", memory)
    )


def _sizes(plan: Plan) -> Table:
    """Types and predicted bytes of the artifacts, one in each column."""
    files = [plan.recipe.file(artifact) for artifact in plan.predictions]
    sizes = Table("predicted bytes", *plan.predictions, box=None)
    sizes.add_row("type", *map(described_types, files))
    if "onnx" in plan.predictions:  # llama.cpp has no choice
        sizes.add_row("inputs of 4-bit products", *(file.inputs for file in files))
    for name in ("file", "weights", "kv_cache", "compute", "reserve", "total"):
        values = (format_size(getattr(prediction, name)) for prediction in plan.predictions.values())
        sizes.add_row(name.replace("_", " "), *values)
    return sizes


def _download(plan: Plan) -> str:
    n_bytes = sum(file.stat().st_size for file in plan.open_source().files)
    return f"{format_size(n_bytes)} of weights, into the hub's cache; the time does not count it"


def _lines(what: str, lines: Mapping[str, int]) -> Table:
    table = Table(what, format_size(sum(lines.values())), box=None)
    for name, n_bytes in lines.items():
        table.add_row(name, format_size(n_bytes))
    return table


def _recovery(plan: Plan) -> list[str]:
    """A line for each rung, and for each that was refused."""
    choice, student = plan.recipe.recover, plan.student_spec
    lines = [f"{refused.rung} ({refused.loss}): refused, {refused.why}" for refused in plan.refused_rungs]
    for rung in choice.trained:
        steps = schedule_of(choice, rung, rung.blocks).n_steps
        of_file = rung is choice.after_quantizing
        name = after_quantizing_name(rung, student) if of_file else scope_of(rung).name_in(student)
        lines.append(f"{name} ({rung.loss}), up to {steps} steps of {rung.blocks_per_step} x {BLOCK_LENGTH} tokens")
    if choice.trained and plan.recover_seconds:
        lines[-1] += f"; at most {format_duration(plan.recover_seconds)} in all"
    return lines or ["none"]
