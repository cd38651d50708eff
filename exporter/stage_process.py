"""Starts a stage's process, waits for it, and makes sure that it does not outlive the wait."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

from exporter.progress import restore_terminal
from exporter.stage import Outcome
from exporter.work import WorkDirectory

__all__ = ["Death", "run_in_process"]

_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
_SECONDS_TO_END = 2


@dataclass(frozen=True)
class Death:
    """The process ended without saying how it went."""

    returncode: int  # as subprocess gives it: minus the signal's number

    def __str__(self) -> str:
        if self.returncode < 0:
            return f"died with {signal.Signals(-self.returncode).name}"
        return f"ended with code {self.returncode} without a message"

    @property
    def is_a_crash(self) -> bool:
        """Whether the program did it itself; signals such as SIGTERM or SIGKILL come from outside."""
        return self.returncode > 0 or -self.returncode in _CRASHES

    @property
    def advice(self) -> str:
        """What to do about it."""
        if self.returncode == -signal.SIGKILL:
            return (
                "if nobody killed it, the system ran out of memory: close other programs or lower --memory; "
                "the same command goes on where this run was"
            )
        return "the same command goes on where this run was"


def run_in_process(work: WorkDirectory, stage: str, group: str | None = None) -> Outcome | Death:
    """Runs a stage in a process of its own, one of a ``group`` if there is one, and returns how that went.

    When waiting is interrupted (KeyboardInterrupt), the process is ended first.
    """
    command = [sys.executable, "-m", "exporter.stage", str(work.folder), stage, str(os.getpid())]
    command += [] if group is None else [group]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            answer, _ = process.communicate()
        finally:
            _end(process)
    try:
        return Outcome(**json.loads(answer))
    except (ValueError, TypeError):
        restore_terminal()
        return Death(process.returncode)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
    restore_terminal()
