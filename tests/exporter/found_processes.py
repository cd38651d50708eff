"""Looking at the processes of a run from outside."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from contextlib import suppress

import psutil

__all__ = ["are_gone", "stage_of"]

_SECONDS_BETWEEN_LOOKS = 0.05
_LOOKS = 12_000
_SECONDS_TO_END = 60  # far less when the machine is not busy


def stage_of(run: int, but: Collection[psutil.Process] = ()) -> psutil.Process:
    """The process of the stage that the run works on, as soon as there is one.

    Its parent is the run's fork server, or the run itself when few stages are left.

    Args:
        run: the run's process.
        but: processes of earlier stages, which may not be gone yet.

    Raises:
        AssertionError: the run has ended, or there is no stage for minutes.
    """
    process = psutil.Process(run)
    for _ in range(_LOOKS):
        assert process.status() != psutil.STATUS_ZOMBIE, "the run has ended"
        for child in process.children():
            with suppress(psutil.NoSuchProcess):
                command = child.cmdline()
                if "multiprocessing.spawn" in " ".join(command):
                    return child
                if "multiprocessing.forkserver" in " ".join(command):
                    for stage in child.children():
                        # by then the server has told the run of it; a program that an import starts looks otherwise
                        time.sleep(_SECONDS_BETWEEN_LOOKS)
                        if stage not in but and stage.cmdline() == command:
                            return stage
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    raise AssertionError("no stage was started")


def are_gone(processes: Iterable[psutil.Process]) -> bool:
    """Whether they all end, or have ended."""
    _, alive = psutil.wait_procs(list(processes), timeout=_SECONDS_TO_END)
    return not alive
