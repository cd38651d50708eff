"""Starts processes of this program, waits for them, and makes sure that they do not outlive the wait.

Importing torch and what else a process needs takes seconds of processor time, and a run starts a dozen. So on Linux
they are forked from a server that has imported it all once (:mod:`multiprocessing`, start method "forkserver"). It
begins with the first process and ends with the run; it does nothing but fork, so it has no thread and no CUDA.
Elsewhere, where system libraries do not survive a fork, each process starts from nothing ("spawn").
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from compressors.model import families
from exporter.processes.fork_server import ensure_server
from exporter.processes.surroundings import STDERR, Surroundings

__all__ = ["Child", "Death", "run_child", "start_server"]

_PRELOADED = (
    "exporter",  # first: it keeps the libraries quiet
    "transformers.modeling_utils",  # the base of all its model classes; with torch it takes most of the time
    "transformers.models.auto.tokenization_auto",  # the writers of both containers load the tokenizer with it
    "exporter.stages.teacher.calibrate",
    "exporter.stages.student.compress",
    "exporter.stages.student.recover",
    "exporter.stages.files.writers",
    "exporter.stages.files.retune",
    "exporter.stages.judge.reference",
    *(f"{families.__name__}.{module.name}" for module in pkgutil.iter_modules(families.__path__)),  # to open a model
)
"""The modules that the server imports before it forks: only code. Neither runtime is among them: only stages that
measure files load one, and ONNX Runtime starts threads, which a fork would lose."""
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGALRM}
_SECONDS_TO_END = 2
_UNKNOWN_CODE = 255  # multiprocessing's code when the server died before the process


@dataclass(frozen=True)
class Death:
    """The process ended without saying how it went."""

    returncode: int  # as multiprocessing gives it: minus the signal's number

    def __str__(self) -> str:
        if self.returncode == -signal.SIGALRM:  # validate.runtimes.time_limit
            return "was ended, because nothing was finished within its time limit"
        if self.returncode < 0:
            return f"died with {signal.Signals(-self.returncode).name}"
        return f"ended with code {self.returncode} without a message"

    @property
    def is_a_crash(self) -> bool:
        """True if the program caused it; signals such as SIGTERM or SIGKILL come from outside."""
        return self.returncode not in (0, _UNKNOWN_CODE) and (self.returncode > 0 or -self.returncode in _CRASHES)

    @property
    def advice(self) -> str:
        """Says what the user can do about it."""
        if self.returncode == -signal.SIGKILL:
            return (
                "if nobody killed it, the system ran out of memory: close other programs or lower --memory; "
                "the same command goes on where this run was"
            )
        return "the same command goes on where this run was"


@dataclass(frozen=True)
class Child:
    """A process that is to be started."""

    target: Callable[..., None]
    """Called with the arguments, the surroundings to enter, and the connection that takes its messages."""
    arguments: tuple[Any, ...]
    output: int = STDERR  # file descriptor that takes all it prints
    alone: bool = False  # at most one more follows, so the server would import more than it saves
    leads_group: bool = False  # it makes itself the leader of a group of processes, which ends with it


def run_child(child: Child, take: Callable[[bytes], None]) -> Death:
    """Runs a process to its end.

    When waiting is interrupted (KeyboardInterrupt), the process is ended first.

    Args:
        child: the process to run.
        take: is called with each message.

    Returns:
        How it ended; if its last message was its answer, ignore this.
    """
    resource_tracker.ensure_running()  # multiprocessing's second process; starting it would unblock signals
    context = multiprocessing.get_context("spawn") if child.alone else _context()
    answer, answers = context.Pipe(duplex=False)
    arguments = (*child.arguments, Surroundings.here(child.output), answers)
    process = context.Process(target=child.target, args=arguments)
    with answer:
        try:
            with answers, _main_module_hidden(), _deaf_to_ctrl_c():
                process.start()
            _take_all(answer, take)
            process.join()
        except (EOFError, ConnectionError):  # the server was killed
            return Death(_UNKNOWN_CODE)
        finally:
            _end(process, child)
    death = Death(_UNKNOWN_CODE if process.exitcode is None else process.exitcode)
    process.close()
    return death


def start_server() -> None:
    """Starts the server's imports, so that the first process need not wait for them."""
    _context()


def _take_all(answer: Connection[None, bytes], take: Callable[[bytes], None]) -> None:
    """Reads messages until the process has ended."""
    while True:
        try:
            message = answer.recv_bytes()
        except EOFError:
            return
        take(message)


def _end(process: BaseProcess, child: Child) -> None:
    if process.pid is None:
        return
    if child.leads_group:
        with suppress(ProcessLookupError):  # the group is gone, or does not exist yet
            os.killpg(process.pid, signal.SIGKILL)
    if process.exitcode is None:
        process.terminate()
        process.join(_SECONDS_TO_END)
        if process.exitcode is None:
            process.kill()
            process.join()


def _context() -> ForkServerContext | SpawnContext:
    """The way to start processes on this system; on Linux the fork server is running when this returns."""
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

    Ctrl-C reaches the whole group. The run answers it; the server and its children must not, not even while they start.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Hides the calling program from multiprocessing, which would run it again in the child.

    A child needs nothing from it, and a script that exports a model need not be written for that.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
