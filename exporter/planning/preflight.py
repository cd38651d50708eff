"""Checks that refuse a run before any work, so that nobody loses hours to a full disk."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.recover.training_memory import refuse_too_large
from exporter.estimating.disk import disk_lines, disk_lines_of_all, output_lines
from exporter.estimating.planned_types import planned_block_length
from exporter.estimating.sizes import format_size
from exporter.file_names import STAGE_RECORD
from exporter.planning.job import Job
from exporter.planning.plan import Plan
from exporter.planning.recovery import WRITTEN_ITEMSIZE, scope_of
from exporter.stages.table import ALL_STAGES
from validate.metrics.generation import NEW_TOKENS, PROMPT_TOKENS
from validate.runtimes.cost import LEAST_CONTEXT

__all__ = [
    "described_needs",
    "refuse_to_cut_onnx",
    "refuse_too_large_rungs",
    "refuse_too_little_disk",
    "refuse_too_little_memory",
    "refuse_too_short_a_context",
    "refuse_unwritable_places",
    "spare_disk",
]


def refuse_unwritable_places(job: Job) -> None:
    """Tries to create files where the output and the work will lie; leaves nothing.

    Raises:
        InputError: no file can be created.
    """
    for flag, place in (("--out", job.out.parent), ("--work-dir", job.work_dir)):
        folder = _nearest_folder(place)
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(
                f"{flag}: nothing can be written in {folder} ({error.strerror}); choose another place"
            ) from None


def refuse_too_little_disk(plans: Sequence[Plan], work_folder: Path, out: Path) -> None:
    """Compares the free disk with the files that the run will write; an unfinished run's files are there already.

    Args:
        plans: the plans of all budgets, whose files stay until the last one is finished.
        work_folder: the folder for all unfinished work.
        out: the output's place.

    Raises:
        InputError: the disk is too small.
    """
    lines = _disk_lines(plans, work_folder)
    needed = sum(lines.values()) - _bytes_below(work_folder)
    work_place, out_place = _nearest_folder(work_folder), _nearest_folder(out)
    _refuse_too_little(work_place, needed, lines, "choose another --work-dir and --out")
    if work_place.stat().st_dev != out_place.stat().st_dev:  # the output is copied there
        copied = dict(sum((Counter(output_lines(plan)) for plan in plans), Counter[str]()))
        _refuse_too_little(out_place, sum(copied.values()), copied, "choose another --out")


def described_needs(plans: Sequence[Plan], work_folder: Path, least_memory: int, free_memory: int) -> list[str]:
    """The needs of a run against what is there, a line for memory and one for the disk.

    Args:
        plans: the plans of all budgets.
        work_folder: the folder for all unfinished work.
        least_memory: the least memory that the stages need, in bytes.
        free_memory: the machine's free memory, in bytes.
    """
    disk = max(0, sum(_disk_lines(plans, work_folder).values()) - _bytes_below(work_folder))
    free_disk = shutil.disk_usage(_nearest_folder(work_folder)).free
    return [
        f"memory: at least {format_size(least_memory)}; this run takes up to {format_size(plans[0].memory_bytes)} "
        f"(--memory), {format_size(free_memory)} are free",
        f"disk: up to {format_size(disk)} in {work_folder}; {format_size(free_disk)} are free",
    ]


def spare_disk(plan: Plan, work_folder: Path) -> int:
    """Bytes that a new run leaves free on the disk of its work; negative if it does not fit."""
    return shutil.disk_usage(_nearest_folder(work_folder)).free - sum(disk_lines(plan).values())


def refuse_too_little_memory(lines: Mapping[str, int], limit: int, free: int) -> None:
    """Compares ``--memory`` and the free memory with the least that the stages need.

    Args:
        lines: the least memory, by purpose.
        limit: the run's limit, in bytes.
        free: the machine's free memory, in bytes.

    Raises:
        InputError: one of them is too small.
    """
    needed = sum(lines.values())
    needs = f"the {format_size(needed)} that this model needs ({_listed(lines)})"
    if free < needed:
        raise InputError(f"{format_size(free)} of memory are free, less than {needs}; close programs, or use --force")
    if limit < needed:
        raise InputError(
            f"--memory: {format_size(limit)} (without the flag it is half of what is free) is below {needs}; "
            f"{format_size(free)} are free: give more of it, close programs, or use --force"
        )


def refuse_too_short_a_context(spec: ModelSpec) -> None:
    """Compares the model's context with the texts that it will write, and the cache that is measured.

    Raises:
        UnsupportedError: the context is too short for them.
    """
    least = max(PROMPT_TOKENS + NEW_TOKENS, LEAST_CONTEXT)
    if spec.context_length < least:
        key = "sliding_window" if spec.window == spec.context_length else "max_position_embeddings"
        raise UnsupportedError(
            f"the model's context is {spec.context_length} tokens ({key} in config.json), and "
            f"validation lets it write texts of {least}: a model with so short a context is not supported"
        )


def refuse_too_large_rungs(plan: Plan) -> None:
    """Compares ``--memory`` with the training memory of the recipe's rungs of recovery.

    Raises:
        InputError: it is too small for one of them.
    """
    spec, itemsize, recover = plan.student_spec, plan.open_source().storage_type.itemsize, plan.recipe.recover
    for rung in recover.rungs:
        if rung.scope != "router":  # routers need no more than inference
            refuse_too_large(scope_of(rung), spec, itemsize, plan.memory_bytes)
    beside_codes = recover.after_quantizing
    if beside_codes is not None and beside_codes.scope != "router":
        for artifact in plan.recipe.artifacts:
            block_length = planned_block_length(plan.recipe, artifact, spec)
            refuse_too_large(scope_of(beside_codes), spec, WRITTEN_ITEMSIZE, plan.memory_bytes, block_length)


def refuse_to_cut_onnx(plan: Plan) -> None:
    """Compares ``--shard-size`` with the data of the ONNX file, which stay one file.

    Raises:
        InputError: they are larger, or may become so.
    """
    if plan.shard_bytes is None or plan.recipe.onnx is None:
        return
    most = plan.predictions["onnx"].file if plan.search is None else plan.recipe.budget.bytes
    if most > plan.shard_bytes:
        raise InputError(
            f"--shard-size: an ONNX file's data are not cut, and they may take {format_size(most)}; "
            "give at least that, or leave ONNX out (--formats gguf)"
        )


def _refuse_too_little(place: Path, needed: int, lines: Mapping[str, int], instead: str) -> None:
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{place} has {format_size(free)} free, and the run puts up to {format_size(needed)} there "
            f"({_listed(lines)}); free space, {instead}, or use --force"
        )


def _disk_lines(plans: Sequence[Plan], work_folder: Path) -> dict[str, int]:
    return disk_lines(plans[0], _not_finished(work_folder)) if len(plans) == 1 else disk_lines_of_all(plans)


def _listed(lines: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {format_size(n_bytes)}" for what, n_bytes in lines.items())


def _not_finished(folder: Path) -> list[str]:
    """The names of the stages that an unfinished run has not finished: those before them need no disk any more."""
    finished = {path.parent.name for path in folder.rglob(STAGE_RECORD)}
    return [stage.name for stage in ALL_STAGES if stage.name not in finished]


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _nearest_folder(place: Path) -> Path:
    """``place``, or the folder above it that exists already."""
    while not place.exists():
        place = place.parent
    return place
