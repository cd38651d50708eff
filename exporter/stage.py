"""One stage in a process of its own, so that its peak memory is its own.

    python -m exporter.stage WORK_DIRECTORY STAGE PARENT [GROUP]

reads ``plan.json`` of the work directory, writes into ``STAGE.partial``, and says on standard output, in one JSON
object, how it went; whatever else is printed goes to standard error. It ends by itself when the run that started it,
process PARENT, is gone. With GROUP it shares the stage with other processes (:mod:`exporter.team`).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from compressors.model.errors import InputError, MoeExportError
from exporter.plan import Plan
from exporter.progress import Progress
from exporter.source_state import SourceState
from exporter.work import WorkDirectory
from validate.cost import peak_rss_bytes
from validate.lifetime import end_with_parent

__all__ = ["Outcome", "StageContext", "source_error"]


@dataclass(frozen=True)
class StageContext:
    """What a stage is given."""

    plan: Plan
    work: WorkDirectory
    output: Path  # the folder to write into
    progress: Progress


@dataclass(frozen=True)
class Outcome:
    """How a stage went."""

    peak_rss_bytes: int
    error: str | None = None
    exit_code: int = 0


def source_error(plan: Plan, work: WorkDirectory) -> InputError | None:
    """An error if the checkpoint is not what it was when the run began, which explains any other failure."""
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


def _main(work: WorkDirectory, name: str, parent: int, group: str | None = None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent answers it, and this ends
    with _standard_output() as answer:
        error: MoeExportError | None = None
        try:
            with _place(work, group):
                end_with_parent(parent)  # with the lock held: from here on the next run waits for this process
                error = _run(work, name, group)
        except MoeExportError as refusal:
            error = refusal
        peak = peak_rss_bytes()
        outcome = Outcome(peak) if error is None else Outcome(peak, str(error), error.exit_code)
        json.dump(asdict(outcome), answer)


def _place(work: WorkDirectory, group: str | None) -> AbstractContextManager[None]:
    """The lock on the partial folder; of a group the first process holds it for all."""
    return work.stage_lock() if group is None or os.environ["RANK"] == "0" else nullcontext()


def _run(work: WorkDirectory, name: str, group: str | None) -> MoeExportError | None:
    plan = work.plan()
    changed = source_error(plan, work)
    if changed is not None:
        return changed
    shows_progress = group is None or os.environ["RANK"] == "0"
    context = StageContext(plan, work, work.folder / f"{name}.partial", Progress(silent=not shows_progress))
    error: MoeExportError | None = None
    try:
        with nullcontext() if group is None else _joined(group, plan):
            importlib.import_module(f"exporter.stages.{name}").run(context)
    except MoeExportError as refusal:
        error = refusal
    except MemoryError:
        error = MoeExportError(f"stage {name} ran out of memory; lower --memory or close other programs")
    except ConnectionError as failure:
        error = MoeExportError(f"stage {name}: {failure}; the same command goes on where this run was")
    except OSError as failure:
        error = MoeExportError(f"stage {name}: {failure}; free space or choose another --work-dir")
    except Exception:
        error = MoeExportError(f"internal error in stage {name}, please report it:\n{traceback.format_exc()}")
    return source_error(plan, work) or error


@contextmanager
def _joined(group: str, plan: Plan) -> Iterator[None]:
    import torch

    from exporter.team import join_group

    try:
        with join_group(group, torch.device(plan.device)):
            yield
    except RuntimeError as failure:  # torch.distributed's way to say that another process is gone
        first_line = str(failure).splitlines()[0]
        raise ConnectionError(f"another process of the group failed or was lost ({first_line})") from failure


def _standard_output() -> TextIO:
    """Standard output for the one answer; what libraries print, in C too, goes to standard error from now on."""
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answer


if __name__ == "__main__":
    _main(WorkDirectory(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
