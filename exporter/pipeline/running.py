"""Runs stages one by one, each in a process of its own, and only those that are not finished."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence

from compressors.model.errors import InputError, MoeExportError
from exporter.pipeline.order import fingerprints, needless, reads_of, taken
from exporter.pipeline.stage_process import Death, run_in_process, source_error
from exporter.planning.plan import Plan
from exporter.processes.progress import Count
from exporter.processes.team import Team
from exporter.progress.run_progress import RunProgress
from exporter.stages.table import CALIBRATE
from exporter.work.directory import Reads, StageRecord, WorkDirectory
from exporter.work.input_state import SourceState
from exporter.work.stage import Stage

__all__ = ["StageError", "follow", "run_stages", "source_of_run", "unfinished"]

_FEW = 2
"""With no more stages left than this, starting each one directly is faster than starting the fork server."""


class StageError(MoeExportError):
    """A stage failed; carries the exit code that the stage asked for."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_stages(
    plan: Plan,
    work: WorkDirectory,
    stages: Sequence[Stage],
    progress: RunProgress,
    team: Team | None = None,
    kept: Collection[str] | None = None,
) -> dict[str, StageRecord]:
    """Runs the unfinished stages, each in its own process, and returns all records.

    Args:
        plan: the plan.
        work: its work.
        stages: the stages, in their order.
        progress: is told what happens.
        team: other processes, which take part in the stages that can be shared.
        kept: the stages whose files stay, because others than these stages need them; of the rest a file is removed
            when neither a stage to come nor the report reads it. None: all files stay.

    Raises:
        InputError: the checkpoint is not the one that the run began with.
        StageError: a stage failed; finished stages stay.
    """
    source, touched = source_of_run(plan, work)
    if touched is not None:
        progress.say(f"{plan.source}: {touched} since this run began: starting again from {CALIBRATE.name}")
    source.save(work.source_path)
    expected = fingerprints(plan, stages, source)
    records: dict[str, StageRecord] = {}
    to_do = _to_do(plan, work, stages, expected)
    few = len(to_do) <= _FEW
    for is_done in (True, False):
        known = (work.stage(stage.name) for stage in stages if (stage.name not in to_do) == is_done)
        progress.expect_also(known, done=is_done)
    for number, stage in enumerate(stages, start=1):
        record = None if stage.name in to_do else work.record(stage.name)
        if record is not None:
            progress.done_already(work.stage(stage.name), stage.what)
        else:
            progress.begin(work.stage(stage.name), stage.what)
            members = team if stage.shared else None
            own = _taken(plan, stage, stages[number:], to_do, kept)
            record = _run(stage, plan, work, expected[stage.name], members, own, count=progress.advance, alone=few)
            progress.end(record.seconds, record.peak_rss_bytes)
        records[stage.name] = record
        if kept is not None:
            to_come = [other for other in stages[number:] if other.name in to_do]
            _remove_needless(plan, work, [other for other in stages[:number] if other.name not in kept], to_come)
    return records


def _to_do(plan: Plan, work: WorkDirectory, stages: Sequence[Stage], expected: Mapping[str, str]) -> set[str]:
    """The stages that are not done, and those before them whose files they read and that were removed since.

    A stage that is not done makes files again that it can make itself.
    """
    to_do: set[str] = set()
    wanted: set[tuple[str, str]] = set()
    for stage in reversed(stages):
        record = work.record(stage.name)
        is_done = record is not None and record.fingerprint == expected[stage.name]
        if not is_done or any((stage.name, file) in wanted for file in work.removed(stage.name)):
            to_do.add(stage.name)
            wanted |= {(writer, file.name) for writer, file in reads_of(stage, plan) - stage.takes}
    return to_do


def _taken(
    plan: Plan, stage: Stage, later: Sequence[Stage], to_do: Collection[str], kept: Collection[str] | None
) -> Reads:
    """The files that become the stage's own; none of a stage whose files stay."""
    if kept is None:
        return frozenset()
    own = taken(plan, stage, [other for other in later if other.name in to_do])
    return frozenset((writer, file) for writer, file in own if writer not in kept)


def _remove_needless(plan: Plan, work: WorkDirectory, done: Sequence[Stage], to_come: Sequence[Stage]) -> None:
    for name, files in needless(plan, done, to_come).items():
        work.remove_files(name, files)


def source_of_run(plan: Plan, work: WorkDirectory) -> tuple[SourceState, str | None]:
    """Returns the checkpoint's state, with which every stage compares the files that it finds.

    Returns:
        The state, and the name of a file that was touched since the run began with the same size and header, if any.

    Raises:
        InputError: the checkpoint is not the one that the run began with, or cannot be read.
    """
    now, began = SourceState.of(plan.source), SourceState.load(work.source_path)
    if began is None:
        return now, None
    change = began.change_to(now)
    if change is None:
        return began, None
    if not change.touched_only:
        raise InputError(
            f"{plan.source} is not the model that this run began with: {change.what}; put the original back, or "
            f"remove {work.folder} to begin anew"
        )
    return now, change.what


def unfinished(plan: Plan, work: WorkDirectory, stages: Sequence[Stage]) -> list[str]:
    """Names of the stages that are still to be run.

    Raises:
        InputError: the checkpoint is not the one that the run began with.
    """
    expected = fingerprints(plan, stages, source_of_run(plan, work)[0])
    to_do = _to_do(plan, work, stages, expected)
    return [stage.name for stage in stages if stage.name in to_do]


def _run(
    stage: Stage,
    plan: Plan,
    work: WorkDirectory,
    fingerprint: str,
    team: Team | None,
    own: Reads,
    *,
    count: Count,
    alone: bool,
) -> StageRecord:
    with work.stage_lock():
        work.begin(stage.name, fingerprint, resumes=stage.resumes)
        for writer, file in own:
            work.hand_over(writer, file, stage.name)
    start = time.monotonic()
    call = None if team is None else team.call(_call(work, stage))
    end = run_in_process(work, stage.name, call, alone=alone, count=count)
    seconds = time.monotonic() - start
    if isinstance(end, Death):
        record = StageRecord(fingerprint, seconds, 0, crash=_crash(stage, plan, work, end))
    elif end.error is not None and stage.crash_is_a_finding and end.is_finding:
        record = StageRecord(fingerprint, seconds, end.peak_rss_bytes, end.source_bytes, end.error)
    elif end.error is not None:
        raise StageError(end.error, end.exit_code)
    else:
        record = StageRecord(fingerprint, seconds, end.peak_rss_bytes, end.source_bytes)
    work.finish(stage.name, record)
    return record


def follow(team: Team) -> None:
    """Makes the other processes of a team take part in the stages that the first one calls them to.

    A stage that fails also fails in the first process, which reports it.
    """
    for what, group in team.calls():
        call = json.loads(what)
        run_in_process(WorkDirectory.from_json(call["work"]), call["stage"], group)


def _call(work: WorkDirectory, stage: Stage) -> str:
    return json.dumps({"work": work.to_json(), "stage": stage.name})


def _crash(stage: Stage, plan: Plan, work: WorkDirectory, death: Death) -> str:
    """Says how a runtime crashed, if it did; any other death ends the run, which can be resumed."""
    changed = source_error(plan, work)  # a file that was cut off while it was mapped into memory
    if changed is not None:
        raise StageError(str(changed), changed.exit_code)
    if stage.crash_is_a_finding and death.is_a_crash:
        return f"the process {death}"
    raise StageError(f"stage {stage.name}: its process {death}; {death.advice}", 1)
