"""Many cases, shared among processes; a process that a case kills is replaced by another, which continues after it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.cases import Case
from tests.fuzz.limits import limited_memory

__all__ = ["Outcome", "run_cases"]

_MEMORY = 6 * 10**9  # bytes that a case may ask for
_COMMAND_SECONDS = 240
_SILENT_SECONDS = _COMMAND_SECONDS + 60  # after which a process is given up


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case that the readers or a whole command got."""

    case: Case
    way: str  # read or command
    end: str
    complaint: str | None


def run_cases(cases: Sequence[Case], inputs: Path, folder: Path, *, every: int, processes: int) -> Iterator[Outcome]:
    """Runs all cases; of each kind every so-manieth also as a whole command."""
    work = sorted(((case, way) for case in cases for way in _ways(case, every)), key=lambda pair: pair[1] == "command")
    workers = [_Worker(work[number::processes], inputs, folder / str(number)) for number in range(processes)]
    while workers:
        time.sleep(0.2)
        for worker in list(workers):
            yield from worker.news()
            if worker.is_done:
                workers.remove(worker)


class _Worker:
    """A process, and where it writes what it does: a line when it begins a case, one when it is done with it."""

    def __init__(self, work: Sequence[tuple[Case, str]], inputs: Path, folder: Path) -> None:
        self._to_do = list(work)
        self._inputs, self._folder = inputs, folder
        folder.mkdir()
        self._log = folder / "log"
        self._start()

    @property
    def is_done(self) -> bool:
        return not self._to_do and self._process is None

    def news(self) -> Iterator[Outcome]:
        """Yields the outcomes since the last call."""
        status = self._status()
        lines = self._log.read_text(encoding="utf-8").splitlines()[self._n_read :]
        for line in lines:
            if not line.endswith("]"):
                break  # half written
            self._n_read += 1
            self._heard = time.monotonic()
            yield self._outcome(*json.loads(line))
        if status is not None:
            self._process = None
            if self._to_do:
                yield self._outcome("signal", f"the process ended with status {status}")
                self._start()

    def _status(self) -> int | None:
        """How the process ended; None while it goes on. One that says nothing for long is ended."""
        if self._process is None:
            return None
        if time.monotonic() - self._heard > _SILENT_SECONDS:
            os.kill(self._process, signal.SIGKILL)
            return os.waitpid(self._process, 0)[1]
        ended, status = os.waitpid(self._process, os.WNOHANG)
        return status if ended else None

    def _outcome(self, end: str, complaint: str | None) -> Outcome:
        case, way = self._to_do.pop(0)
        return Outcome(case, way, end, complaint)

    def _start(self) -> None:
        self._log.write_text("", encoding="utf-8")
        self._n_read, self._heard = 0, time.monotonic()
        self._process: int | None = os.fork() if self._to_do else None
        if self._process == 0:
            try:
                with self._log.open("a", encoding="utf-8", buffering=1) as log:
                    _silence()
                    for case, way in self._to_do:
                        log.write(json.dumps(run(case, way, self._inputs, self._folder)) + "\n")
            finally:
                os._exit(0)


def run(case: Case, way: str, inputs: Path, folder: Path) -> tuple[str, str | None]:
    """Runs one case in one way."""
    with limited_memory(_MEMORY):
        return _run(case, way, inputs, folder)


def _run(case: Case, way: str, inputs: Path, folder: Path) -> tuple[str, str | None]:
    return case.read(inputs, folder) if way == "read" else case.command(inputs, folder, _COMMAND_SECONDS)


def _ways(case: Case, every: int) -> list[str]:
    has_command = case.of_kind.command is not None and case.number % every == 0
    return ["read", "command"] if has_command else ["read"]


def _silence() -> None:
    """Discards the output of libraries about damaged files."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
