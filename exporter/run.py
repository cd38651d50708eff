"""Runs a job until its files are published: plan, stages, report. Command line and tests call the same function."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from compressors.calibration import Splits, block_length_of, read_splits, tokenize
from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import InputError
from compressors.model.json_file import read_json
from compressors.model.special_tokens import special_tokens
from exporter.deviations import find_deviations
from exporter.estimate import describe_time, memory_lines, seconds_by_stage
from exporter.hub import bundled_text, resolve_model
from exporter.job import Job
from exporter.json_text import json_text
from exporter.machine import measure_speeds
from exporter.model_name import local_path, model_name
from exporter.outputs import Outputs, reserved, sha256_of
from exporter.pipeline import run_stages, source_of_run, stages_of, unfinished
from exporter.plan import Plan
from exporter.planner import TextCounts, choose_recipe, predict_recipe, wanted_blocks
from exporter.preflight import (
    refuse_too_large_rungs,
    refuse_too_little_disk,
    refuse_too_little_memory,
    refuse_too_short_a_context,
    refuse_unwritable_places,
    spare_disk,
)
from exporter.recipe import Recipe, TextChoice, load_recipe, recipe_yaml
from exporter.result import build_report, final_recipe
from exporter.teacher_floor import TeacherFloor, choose_teacher_floor
from exporter.team import Team, local_processes
from exporter.text_state import refuse_changed_texts
from exporter.work import WorkDirectory
from validate.report import render_html, render_model_card
from validate.report.facts import failures

__all__ = ["EXIT_CHECK_FAILED", "Result", "make_plan", "run_job"]

EXIT_CHECK_FAILED = 4
_BUNDLED_NAME = "tiny-moe"


@dataclass(frozen=True)
class Result:
    """The output of a run."""

    report: dict[str, Any]
    out: Path

    @property
    def exit_code(self) -> int:
        """0 when every check passed, 4 when one failed."""
        return 0 if self.report["verdict"]["passed"] else EXIT_CHECK_FAILED

    @property
    def failures(self) -> list[str]:
        """The checks that failed, each with its value and threshold."""
        return failures(self.report)


def run_job(job: Job, command: str, announce: Callable[[str], None], team: Team | None = None) -> Result:
    """Runs whatever of the job is not done yet.

    Args:
        job: what to do.
        command: as it was typed, for the report.
        announce: told of each stage.
        team: the other processes, if torchrun started several; this one leads.

    Raises:
        MoeExportError: see its kinds in :mod:`compressors.model.errors`; finished stages stay for the next attempt.
    """
    identity = _identity(job)
    if job.out.exists():
        return _already_published(job, identity)
    refuse_unwritable_places(job)
    work = WorkDirectory(job.work_dir)
    plan = _existing_plan(work, job, identity) or make_plan(job, command)
    if not job.force:
        least = memory_lines(plan.teacher_shape, plan.student_shape, Checkpoint(plan.source).dtype.itemsize)
        refuse_too_little_memory(least, plan.memory_bytes, psutil.virtual_memory().available)
        refuse_too_large_rungs(plan)
        refuse_too_little_disk(plan, work.folder)
    with reserved(job.out), work.lock():
        if job.out.exists():  # another run has just published it
            return _already_published(job, identity)
        work.claim(identity)
        if not work.plan_path.exists():
            plan.save(work.plan_path)
        report = _build(plan, work, identity, announce, team)
        work.remove()
    return Result(report, job.out)


def _build(
    plan: Plan, work: WorkDirectory, identity: dict[str, Any], announce: Callable[[str], None], team: Team | None
) -> dict[str, Any]:
    """Runs the stages and publishes what they made; returns the report."""
    stages = stages_of(plan)
    if to_do := unfinished(plan, work, stages):
        announce(_time_to_go(plan, to_do))
    records = run_stages(plan, work, stages, announce, team)
    announce("write the report")
    outputs = Outputs(plan, work)
    artifacts = outputs.collect()
    report = build_report(plan, work, records, artifacts) | {"job": identity}
    outputs.write_text("recipe.yaml", recipe_yaml(final_recipe(plan, work)))
    outputs.write_text("report.json", json_text(report))
    outputs.write_text("report.html", render_html(report))
    outputs.write_text("README.md", render_model_card(report))
    outputs.publish()
    return report


def make_plan(job: Job, command: str) -> Plan:
    """Decides everything that can be decided from names, shapes and bytes; no weight is read.

    Raises:
        InputError: the model, a text or the recipe is wrong.
        BudgetError: nothing fits the budget.
    """
    folder = resolve_model(job.model, job.revision, offline=job.offline)
    checkpoint = Checkpoint(folder)
    refuse_too_short_a_context(checkpoint.shape)
    calibration, heldout = _texts(job)
    splits = read_splits(calibration, heldout)
    recipe = None if job.recipe is None else load_recipe(job.recipe)
    wanted = wanted_blocks(job, len(splits.heldout.parts)) if recipe is None else recipe.text.blocks
    tokenized = tokenize(splits, folder, block_length_of(checkpoint.shape.context_length), wanted)
    counts = TextCounts(tokenized[0].n_blocks, tokenized[1].n_blocks, len(tokenized[2].blocks))
    memory_bytes = job.memory_bytes or psutil.virtual_memory().available // 2 // local_processes()
    if recipe is None:
        recipe, predictions, refused = choose_recipe(job, checkpoint, _name(job), splits, counts, memory_bytes)
    else:
        tokenized[0].spread(recipe.text.calibration_blocks)  # refused now, not by the stage
        tokenized[1].spread(recipe.text.selection_blocks)
        recipe = _completed(str(job.recipe), recipe, checkpoint, splits)
        predictions, refused = predict_recipe(recipe, checkpoint), ()
    if recipe.compress.student == "dense" and "routing" in job.require:
        raise InputError("--require: a dense student has no routing to compare; leave routing out")
    plan = Plan(
        recipe=recipe,
        source=folder.resolve(),
        calibration=calibration.resolve(),
        heldout=None if heldout is None else heldout.resolve(),
        predictions=predictions,
        # a recipe's number of blocks is followed as it stands, whatever the clock says
        recover_seconds=job.recover_seconds if job.recipe is None else 0,
        refused_rungs=refused,
        memory_bytes=memory_bytes,
        device=job.device,
        require=dict(job.require),
        out=job.out.resolve(),
        command=command,
        own_head=not checkpoint.shape.tied_embeddings,
        end_tokens=special_tokens(folder, checkpoint.shape.vocab_size).ends,
        deviations=find_deviations(checkpoint, recipe.artifacts, recipe.source.model),
    )
    return replace(plan, teacher_floors=_teacher_floors(plan, checkpoint, spare_disk(plan, job.work_dir)))


def _teacher_floors(plan: Plan, checkpoint: Checkpoint, disk_bytes: int) -> dict[str, TeacherFloor]:
    """A file within the budget is loaded in any case: so much memory may be used, whatever the limit of the stages."""
    memory_bytes = max(plan.memory_bytes, *(prediction.total for prediction in plan.predictions.values()))
    chosen = {
        artifact: choose_teacher_floor(
            artifact, checkpoint, plan.recipe, memory_bytes=memory_bytes, disk_bytes=disk_bytes
        )
        for artifact in plan.recipe.artifacts
    }
    return {artifact: floor for artifact, floor in chosen.items() if floor is not None}


def _time_to_go(plan: Plan, stages: Collection[str]) -> str:
    """An estimate for these stages. It is said, and nowhere recorded: outputs must not depend on it."""
    seconds = seconds_by_stage(plan, measure_speeds(plan), psutil.virtual_memory().available)
    return f"time to go: {describe_time({stage: seconds[stage] for stage in stages if stage in seconds})}"


def _identity(job: Job) -> dict[str, Any]:
    """The arguments that make a job this one; equal arguments resume, others are refused."""
    ignored = {"out", "work_dir", "dry_run", "force", "json"}
    values = {name: _plain(value) for name, value in vars(job).items() if name not in ignored}
    values["model"] = None if job.model is None else local_path(job.model)  # validate finds it from any folder
    return values | {"recipe": None if job.recipe is None else sha256_of(job.recipe)}  # edited, it is another job


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, dict) else value


def _existing_plan(work: WorkDirectory, job: Job, identity: dict[str, Any]) -> Plan | None:
    """The plan of an unfinished run of the same job, None if there is no run to go on with."""
    if not work.plan_path.exists():
        return None
    work.claim(identity)
    plan = replace(work.plan(), out=job.out.resolve())  # the work may go on with another --out
    source_of_run(plan, work)  # before anything else is said of a model that is not the one
    what_to_do = f"put it back, or remove {work.folder} and start again"
    refuse_changed_texts(plan.recipe.text, plan.calibration, plan.heldout, what_to_do)
    return plan


def _already_published(job: Job, identity: dict[str, Any]) -> Result:
    try:
        report = read_json(job.out / "report.json")
    except InputError:
        raise InputError(
            f"--out: {job.out} exists and was not written by a finished run; choose another folder, or remove it"
        ) from None
    if report.get("job") != identity:
        raise InputError(f"--out: {job.out} belongs to another run; choose another folder, or remove it")
    text = TextChoice.model_validate(report["recipe"]["text"])
    refuse_changed_texts(text, *_texts(job), f"{job.out} was made with the earlier one: choose another --out")
    # a run that was killed just after it had published leaves work or its lock
    with suppress(InputError), reserved(job.out):
        WorkDirectory(job.work_dir).remove_leftovers(identity)
    return Result(report, job.out)


def _texts(job: Job) -> tuple[Path, Path | None]:
    if job.calibration is None:
        return bundled_text("calibration"), job.text or bundled_text("heldout")
    return job.calibration, job.text


def _name(job: Job) -> str:
    return _BUNDLED_NAME if job.model is None else model_name(job.model)


def _completed(path: str, recipe: Recipe, checkpoint: Checkpoint, splits: Splits) -> Recipe:
    """The recipe with what a person left open: which weights and which text, if any will do."""
    identity = checkpoint.identity()
    if recipe.source.identity not in (None, identity):
        raise InputError(
            f"{path} is a recipe for {recipe.source.model}, whose config or weights differ from the model's"
        )
    digests = {f"{name}_sha256": split.sha256 for name, split in vars(splits).items()}
    for name, split in vars(splits).items():
        if getattr(recipe.text, f"{name}_sha256") not in (None, split.sha256):
            raise InputError(f"{path} was made for another {name} text; give that with --calibration and --text")
    return recipe.model_copy(
        update={
            "source": recipe.source.model_copy(update={"identity": identity}),
            "text": recipe.text.model_copy(update=digests),
        }
    )
