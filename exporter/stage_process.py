"""Starts a stage's process, waits for it, and makes sure that it does not outlive the wait.

Importing torch and what else a stage needs takes seconds of processor time, and a run has a dozen stages. So on Linux
they are forked from a server that has imported it all once (:mod:`multiprocessing`, start method "forkserver"). It
begins with the first stage and ends with the run; it does nothing but fork, so it has no thread and no CUDA. Elsewhere,
where system libraries do not bear a fork, each stage's process starts from nothing ("spawn").
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from types import ModuleType

from exporter.fork_server import ensure_server
from exporter.progress import restore_terminal
from exporter.stage import Outcome, run_stage
from exporter.surroundings import Surroundings
from exporter.work import WorkDirectory

__all__ = ["Death", "run_in_process"]

_PRELOADED = "exporter.stage_imports"
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
_SECONDS_TO_END = 2
_UNKNOWN_CODE = 255  # multiprocessing's, when the server died before the stage


@dataclass(frozen=True)
class Death:
    """The process ended without saying how it went."""

    returncode: int  # as multiprocessing gives it: minus the signal's number

    def __str__(self) -> str:
        if self.returncode < 0:
            return f"died with {signal.Signals(-self.returncode).name}"
        return f"ended with code {self.returncode} without a message"

    @property
    def is_a_crash(self) -> bool:
        """Whether the program did it itself; signals such as SIGTERM or SIGKILL come from outside."""
        return self.returncode not in (0, _UNKNOWN_CODE) and (self.returncode > 0 or -self.returncode in _CRASHES)

    @property
    def advice(self) -> str:
        """What to do about it."""
        if self.returncode == -signal.SIGKILL:
            return (
                "if nobody killed it, the system ran out of memory: close other programs or lower --memory; "
                "the same command goes on where this run was"
            )
        return "the same command goes on where this run was"


def run_in_process(
    work: WorkDirectory, stage: str, group: str | None = None, *, alone: bool = False
) -> Outcome | Death:
    """Runs a stage in a process of its own and returns how that went.

    When waiting is interrupted (KeyboardInterrupt), the process is ended first.

    Args:
        work: of the run.
        stage: its name.
        group: of the processes that share it, if they do.
        alone: no more than another stage is to follow: the server would import more than it saves.
    """
    resource_tracker.ensure_running()  # multiprocessing's second process; starting it would unblock signals
    context = multiprocessing.get_context("spawn") if alone else _context()
    answer, answers = context.Pipe(duplex=False)
    process = context.Process(target=run_stage, args=(work, stage, group, Surroundings.here(), answers))
    with answer:
        try:
            with answers, _main_module_hidden(), _deaf_to_ctrl_c():
                process.start()
            outcome = _outcome(answer)
            process.join()
        except (EOFError, ConnectionError):  # the server was killed
            return Death(_UNKNOWN_CODE)
        finally:
            _end(process)
    death = Death(_UNKNOWN_CODE if process.exitcode is None else process.exitcode)
    process.close()
    if outcome is None:
        restore_terminal()
    return outcome or death


def _outcome(answer: Connection[None, bytes]) -> Outcome | None:
    """Waits for the stage's answer; None if it ended without."""
    try:
        return Outcome(**json.loads(answer.recv_bytes()))
    except EOFError:
        return None


def _end(process: BaseProcess) -> None:
    if process.pid is None or process.exitcode is not None:
        return
    process.terminate()
    process.join(_SECONDS_TO_END)
    if process.exitcode is None:
        process.kill()
        process.join()
    restore_terminal()


def _context() -> ForkServerContext | SpawnContext:
    """How processes are started here; the server, if it is one, runs."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    try:
        with _deaf_to_ctrl_c():
            ensure_server(_PRELOADED)
    except OSError:  # the path of the folder for temporary files may be too long for a socket in it
        return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("forkserver")


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """While it lasts, SIGINT waits, and processes that are started never get it.

    It reaches the whole group. The run answers it; the server, and stages, must not, not even while they start.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """While it lasts, multiprocessing does not find the program that calls, and so does not run it again in the child.

    A stage needs nothing of it, and a script that exports a model need not expect that.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
