"""Runs a stage in a process of its own, so that its peak memory is its own.

The run's side starts that process and is told how the stage went (:func:`run_in_process`); the stage's side runs it
(:func:`run_stage`). Whatever the stage prints goes to standard error. The process ends by itself when the run that
asked for it is gone. A stage can be shared with the processes of other runs, as one of a group
(:mod:`exporter.processes.team`).
"""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection

from compressors.model.errors import InputError, MoeExportError
from compressors.model.files.raw_file import bytes_read
from exporter.planning.plan import Plan
from exporter.processes.child_process import Child, Death, run_child
from exporter.processes.progress import Count, Progress
from exporter.processes.surroundings import Surroundings
from exporter.stages.table import ALL_STAGES
from exporter.work.directory import WorkDirectory
from exporter.work.input_state import WEIGHT_SUFFIXES, SourceState, source_paths
from exporter.work.stage import StageContext
from exporter.writing.files import storage_error
from validate.runtimes.backend import RuntimeCrashError
from validate.runtimes.cost import peak_rss_bytes
from validate.runtimes.lifetime import end_with_creator

__all__ = ["Death", "Outcome", "run_in_process", "run_stage", "source_error"]


_COUNT = "count"
"""The key of a message that says how far the stage is: unit, units done, total."""


@dataclass(frozen=True)
class Outcome:
    """The result of a stage."""

    peak_rss_bytes: int
    source_bytes: int = 0  # read of the original's weights
    error: str | None = None
    exit_code: int = 0
    is_finding: bool = False  # an error tells about a runtime, not about this program


def _nobody(_unit: str, _done: int, _total: int) -> None:
    """Hears a count and does nothing."""


def run_in_process(
    work: WorkDirectory,
    stage: str,
    group: str | None = None,
    *,
    alone: bool = False,
    count: Count = _nobody,
) -> Outcome | Death:
    """Runs a stage in a process of its own and returns its outcome.

    When waiting is interrupted (KeyboardInterrupt), the process is ended first.

    Args:
        work: the work of the run.
        stage: the stage's name.
        group: the group of processes that share the stage, if there is one.
        alone: True if few stages follow, so that the server would import more than it saves.
        count: is called with what the stage counts.
    """
    outcomes: list[Outcome] = []

    def take(message: bytes) -> None:
        content = json.loads(message)
        if _COUNT in content:
            count(*content[_COUNT])
        else:
            outcomes.append(Outcome(**content))

    death = run_child(Child(run_stage, (work, stage, group), alone=alone), take)
    return outcomes[0] if outcomes else death


def source_error(plan: Plan, work: WorkDirectory) -> InputError | None:
    """Returns an error if the checkpoint has changed since the run began, which explains any other failure."""
    try:
        change = work.source().change_to(SourceState.of(plan.source))
    except InputError as error:
        return error
    if change is None:
        return None
    what_to_do = (
        "the same command starts again from calibrate"
        if change.touched_only
        else f"put the original back and run the same command again, or remove {work.folder} to begin anew"
    )
    return InputError(f"{plan.source} changed while this run was reading it: {change.what}; {what_to_do}")


def run_stage(
    work: WorkDirectory, name: str, group: str | None, surroundings: Surroundings, answer: Connection[bytes, None]
) -> None:
    """Runs in the stage's process: writes into ``STAGE.partial``, and answers with an outcome, as a JSON object.

    Before that it sends what it counts.
    """

    def tell(unit: str, done: int, total: int) -> None:
        answer.send_bytes(json.dumps({_COUNT: (unit, done, total)}).encode())

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the run answers it, and ends this
    surroundings.enter()
    error: MoeExportError | None = None
    try:
        with _place(work, group):
            end_with_creator()  # with the lock held: from here on the next run waits for this process
            error = _run(work, name, group, Progress() if _follows(group) else Progress(tell))
    except MoeExportError as refusal:
        error = refusal
    measured = Outcome(peak_rss_bytes(), _source_bytes(work))
    outcome = (
        measured
        if error is None
        else replace(
            measured, error=str(error), exit_code=error.exit_code, is_finding=isinstance(error, RuntimeCrashError)
        )
    )
    answer.send_bytes(json.dumps(asdict(outcome)).encode())


def _source_bytes(work: WorkDirectory) -> int:
    """The bytes that this process has read of the original's weights; 0 if plan or original cannot be read."""
    try:
        return bytes_read(path for path in source_paths(work.plan().source) if path.suffix in WEIGHT_SUFFIXES)
    except (MoeExportError, OSError):
        return 0


def _place(work: WorkDirectory, group: str | None) -> AbstractContextManager[None]:
    """The lock on the partial folder; in a group, the first process holds it for all."""
    return nullcontext() if _follows(group) else work.stage_lock()


def _follows(group: str | None) -> bool:
    """True for all processes of a group but the first."""
    return group is not None and os.environ["RANK"] != "0"


def _run(work: WorkDirectory, name: str, group: str | None, progress: Progress) -> MoeExportError | None:
    plan = work.plan()
    changed = source_error(plan, work)
    if changed is not None:
        return changed
    (stage,) = (stage for stage in ALL_STAGES if stage.name == name)
    context = StageContext.of(stage, plan, work, progress)
    error: MoeExportError | None = None
    try:
        with nullcontext() if group is None else _joined(group, plan):
            stage.run(context)
    except MoeExportError as refusal:
        error = refusal
    except MemoryError:
        error = MoeExportError(f"stage {name} ran out of memory; lower --memory or close other programs")
    except ConnectionError as failure:
        error = MoeExportError(f"stage {name}: {failure}; the same command goes on where this run was")
    except Exception as failure:
        error = storage_error(failure, context.output) or MoeExportError(
            f"internal error in stage {name}, please report it:\n{traceback.format_exc()}"
        )
    return source_error(plan, work) or error


@contextmanager
def _joined(group: str, plan: Plan) -> Iterator[None]:
    import torch

    from exporter.processes.team import join_group

    try:
        with join_group(group, torch.device(plan.device)):
            yield
    except RuntimeError as failure:  # torch.distributed's way to say that another process is gone
        first_line = str(failure).splitlines()[0]
        raise ConnectionError(f"another process of the group failed or was lost ({first_line})") from failure
