"""Runs a job until its files are published: plan, stages, report. Command line and tests call the same function."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError
from compressors.model.files.json_file import read_json
from exporter.estimating.estimate import describe_time, seconds_by_stage
from exporter.estimating.machine import measure_speeds
from exporter.estimating.needs import memory_lines
from exporter.file_names import MODEL_CARD, RECIPE, REPORT, REPORT_PAGE
from exporter.hub_push import push_folder, refuse_unless_logged_in
from exporter.pipeline.order import search_stages, stages_of
from exporter.pipeline.parts import Part, budget_parts, found_parts, result_folder, save_plans
from exporter.pipeline.running import run_stages, source_of_run, unfinished
from exporter.planning.job import Job
from exporter.planning.plan import Plan
from exporter.planning.plan_making import texts_of
from exporter.planning.preflight import (
    described_needs,
    refuse_too_large_rungs,
    refuse_too_little_disk,
    refuse_too_little_memory,
    refuse_unwritable_places,
)
from exporter.planning.recipe import TextChoice, recipe_yaml
from exporter.processes.free_memory import free_memory
from exporter.processes.team import Team
from exporter.progress.events import Message, View
from exporter.progress.run_progress import RunProgress
from exporter.publishing.json_text import json_text
from exporter.publishing.model_name import local_path
from exporter.publishing.outputs import Outputs, publish_folder, reserved
from exporter.publishing.result import build_report, final_recipe
from exporter.publishing.without_folders import without_folders
from exporter.stages.table import OF_ALL_FILES, OF_THE_REPORT
from exporter.work.directory import WorkDirectory
from exporter.work.input_state import refuse_changed_texts
from exporter.writing.files import sha256_of
from validate.report.facts import failures
from validate.report.html import render_html
from validate.report.model_card import render_model_card
from validate.report.parts import render_parts

__all__ = ["EXIT_CHECK_FAILED", "Result", "job_identity", "push_release", "run_job"]

EXIT_CHECK_FAILED = 4


@dataclass(frozen=True)
class Result:
    """The output of a run."""

    report: dict[str, Any]
    out: Path

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The report of each part; its own if the run has no parts."""
        return list(self.report["parts"].values()) if "parts" in self.report else [self.report]

    @property
    def exit_code(self) -> int:
        """0 when every check passed, 4 when one failed."""
        return 0 if all(report["verdict"]["passed"] for report in self.reports) else EXIT_CHECK_FAILED

    @property
    def failures(self) -> list[str]:
        """The checks that failed, each with its value and threshold."""
        return [failure for report in self.reports for failure in failures(report)]


def run_job(job: Job, command: str, view: View, team: Team | None = None) -> Result:
    """Runs the parts of the job that are not done yet.

    Args:
        job: the job.
        command: the command as it was typed, for the report.
        view: shows what happens.
        team: the other processes, if torchrun started several; this one leads.

    Raises:
        MoeExportError: see its kinds in :mod:`compressors.model.errors`; finished stages stay for the next attempt.
    """
    if job.push is not None:
        refuse_unless_logged_in(job.push)
    result = _run_parts(job, command, view, team)
    if job.push is not None:
        push_release(result, job.push, view)
    return result


def push_release(result: Result, repository: str, view: View) -> None:
    """Uploads a folder that passed; of another one it is said that it stays here."""
    if result.exit_code:
        view(Message(f"not pushed to {repository}: a check failed"))
        return
    view(Message(f"push {result.out} to {repository}"))
    view(Message(f"pushed: {push_folder(result.out, repository)}"))


def _run_parts(job: Job, command: str, view: View, team: Team | None) -> Result:
    identity = job_identity(job)
    if job.out.exists():
        return _already_published(job, identity)
    refuse_unwritable_places(job)
    work = WorkDirectory(job.work_dir)
    parts = _parts(job, command, work, identity)
    if not job.force:
        refuse_too_little_disk([part.plan for part in parts], work.folder, job.out)
        for part in parts:
            _refuse_too_little_memory(part.plan)
    progress = RunProgress(view)
    with reserved(job.out), work.lock():
        if job.out.exists():  # another run has just published it
            return _already_published(job, identity)
        work.claim(identity)
        save_plans(parts)
        _announce_needs([part.plan for part in parts], work, progress)
        _announce_time(parts, progress)
        built = [found for part in parts for found in _searched(part, progress, team)]
        if len(built) > 1 or parts[0].plan.search is not None:  # more is known now
            _announce_time(built, progress)
        reports = {}
        for part in built:
            kept = () if part is built[-1] else OF_ALL_FILES
            reports[part.name] = _built(part, identity, progress, team, kept)
        report = _published(job, work, reports) if len(built) > 1 else reports[built[0].name]
        work.remove()
    return Result(report, job.out)


def _parts(job: Job, command: str, work: WorkDirectory, identity: dict[str, Any]) -> list[Part]:
    """The parts of the run; an unfinished run of the same job keeps its plans."""
    if work.has_owner:
        work.claim(identity)
    parts = budget_parts(job, command, work)
    for part in parts:
        if part.work.plan_path.exists():
            source_of_run(part.plan, part.work)  # before any other complaint about another model
            what_to_do = f"put it back, or remove {work.folder} and start again"
            refuse_changed_texts(part.plan.recipe.text, part.plan.calibration, part.plan.heldout, what_to_do)
    return parts


def _refuse_too_little_memory(plan: Plan) -> None:
    refuse_too_little_memory(_least_memory(plan), plan.memory_bytes, free_memory())
    refuse_too_large_rungs(plan)


def _least_memory(plan: Plan) -> dict[str, int]:
    return memory_lines(plan.teacher_spec, plan.student_spec, plan.open_source().storage_type.itemsize)


def _announce_needs(plans: Sequence[Plan], work: WorkDirectory, progress: RunProgress) -> None:
    least = max(sum(_least_memory(plan).values()) for plan in plans)
    for line in described_needs(plans, work.folder, least, free_memory()):
        progress.say(line)


def _searched(part: Part, progress: RunProgress, team: Team | None) -> list[Part]:
    """Returns the part itself if its recipe stands, or the parts that the search finds for it."""
    if part.plan.search is None:
        return [part]
    run_stages(part.plan, part.work, search_stages(part.plan), progress, team)
    found = found_parts(part)
    save_plans(found)
    return found


def _built(
    part: Part,
    identity: dict[str, Any],
    progress: RunProgress,
    team: Team | None,
    kept: Collection[str],
) -> dict[str, Any]:
    """Runs the stages of a part and puts its output in its place; returns the report.

    The files of the stages in ``kept`` stay, for other parts.
    """
    plan, work, stages = part.plan, part.work, stages_of(part.plan)
    if plan.out.exists():  # one of several, from an earlier attempt
        if not unfinished(plan, work, stages):
            return read_json(plan.out / REPORT)
        shutil.rmtree(plan.out)  # the search was repeated since, and found something else
    if part.name:
        progress.say(part.name)
    records = run_stages(plan, work, stages, progress, team, kept)
    progress.say("write the report")
    work = work.opening(OF_THE_REPORT)
    outputs = Outputs(plan, work)
    artifacts = outputs.collect()
    report = build_report(plan, work, records, artifacts) | {"job": identity}
    outputs.write_text(RECIPE, recipe_yaml(final_recipe(plan, work)))
    outputs.write_text(REPORT, json_text(report))
    shared = without_folders(report, plan.out)
    outputs.write_text(REPORT_PAGE, render_html(shared))
    outputs.write_text(MODEL_CARD, render_model_card(shared))
    outputs.publish()
    return report


def _published(job: Job, work: WorkDirectory, reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Publishes the folder with the outputs of all parts; returns its own report."""
    folder = result_folder(work, "")
    report = {"parts": reports, "job": job_identity(job)}
    (folder / REPORT).write_text(json_text(report), encoding="utf-8")
    shared = without_folders(report, job.out)
    (folder / MODEL_CARD).write_text(render_parts(shared["parts"]), encoding="utf-8")
    publish_folder(folder, job.out.resolve(), work.folder)
    return report


def _announce_time(parts: Sequence[Part], progress: RunProgress) -> None:
    """Estimates the time of the stages to come. It is only announced, not recorded: outputs must not depend on it."""
    stages = {folder: part for part in parts for folder in _stages_to_come(part)}  # parts share some
    if not stages:
        return
    speeds, free = measure_speeds(parts[0].plan), free_memory()
    seconds = {part.name: seconds_by_stage(part.plan, speeds, free) for part in parts}
    to_come = {folder: seconds[part.name].get(folder.name, 0.0) for folder, part in stages.items()}
    progress.expect(to_come)
    by_name: dict[str, float] = {}
    for folder, value in to_come.items():
        by_name[folder.name] = by_name.get(folder.name, 0.0) + value
    progress.say(f"time to go: {describe_time(by_name)}")


def _stages_to_come(part: Part) -> list[Path]:
    """The folders of a part's stages that are still to be run."""
    plan, work = part.plan, part.work
    stages = stages_of(plan) if plan.search is None else search_stages(plan)
    to_do = [work.stage(name) for name in unfinished(plan, work, stages)]
    if plan.search is not None and to_do:  # nobody knows yet what the search will find: probably one student
        return to_do + [work.stage(stage.name) for stage in stages_of(plan) if stage not in stages]
    found = [] if plan.search is None else found_parts(part)
    return to_do + [folder for one in found for folder in _stages_to_come(one)]


def job_identity(job: Job) -> dict[str, Any]:
    """Returns the arguments that identify a job: a job with equal ones continues its work, others are refused."""
    ignored = {"out", "work_dir", "dry_run", "force", "json", "push"}
    values = {name: _plain(value) for name, value in vars(job).items() if name not in ignored}
    values["model"] = None if job.model is None else local_path(job.model)  # validate finds it from any folder
    values["calibration"] = _texts_given(job)
    files = {name: getattr(job, name) for name in ("recipe", "imatrix")}  # an edited file makes another job
    return values | {name: None if file is None else sha256_of(file) for name, file in files.items()}


def _texts_given(job: Job) -> str | list[str] | None:
    """The calibration texts: None for the bundled one, the path of a single one, of several their weights too."""
    texts = [replace(text, path=text.path.resolve()) for text in job.calibration]
    if len(texts) < 2:
        return str(texts[0].path) if texts else None
    return list(map(str, texts))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, dict) else value


def _already_published(job: Job, identity: dict[str, Any]) -> Result:
    try:
        report = read_json(job.out / REPORT)
    except InputError:
        raise InputError(
            f"--out: {job.out} exists and was not written by a finished run; choose another folder, or remove it"
        ) from None
    if report.get("job") != identity:
        raise InputError(f"--out: {job.out} belongs to another run; choose another folder, or remove it")
    result = Result(report, job.out)
    for part in result.reports:
        text = TextChoice.model_validate(part["recipe"]["text"])
        refuse_changed_texts(text, *texts_of(job), f"{job.out} was made with the earlier one: choose another --out")
    # a run that was killed just after it had published leaves work or its lock
    with suppress(InputError), reserved(job.out):
        WorkDirectory(job.work_dir).remove_leftovers(identity)
    return result
