"""The program in a process of its own that is forked instead of started, so that it need not import anything.

To import torch and transformers takes a program seconds, and then its fork server the same seconds again. Both are
forked here from the fork server of the tests, which has imported everything. From there on everything is as when a
person starts it: the process leads a group and has its own server, signals have their usual effect, its stages are its
own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver, reduction, resource_tracker, util
from typing import Any

from exporter.cli import main
from exporter.pipeline import running
from exporter.processes.child_process import start_server
from exporter.processes.surroundings import Surroundings

__all__ = ["ForkedProgram"]


class ForkedProgram:
    """The running program; what is used of :class:`subprocess.Popen`, with its standard error as text."""

    def __init__(self, command: Sequence[str]) -> None:
        assert list(command[:3]) == [sys.executable, "-m", "exporter"]
        start_server()
        reading, writing = os.pipe()
        self.stderr = os.fdopen(reading, encoding="utf-8")
        arguments = (list(command[3:]), Surroundings.here(writing))
        self._process = multiprocessing.get_context("forkserver").Process(target=_run, args=arguments)
        self._process.start()
        os.close(writing)

    @property
    def pid(self) -> int:
        """The number of its process, and of the group that it leads."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the number of the signal that ended it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits for its end, but not longer than these seconds."""
        self._process.join(timeout)
        return self.returncode


def _run(arguments: list[str], surroundings: Surroundings) -> None:
    os.setsid()
    surroundings.enter()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]  # it has its own
    _offer_server()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    running._FEW = 0  # the server is there, even for the last stages
    sys.argv = ["moe-export", *arguments]
    main()


def _offer_server() -> None:
    """Forks a process that becomes the fork server, when there shall be one: nothing has happened in it until then."""
    here, there = socket.socketpair(socket.AF_UNIX)
    server = os.fork()
    if server == 0:
        here.close()
        _become_server(there)
    there.close()
    start_program = util.spawnv_passfds  # type: ignore[attr-defined]

    def start(path: Any, arguments: list[str], descriptors: list[int]) -> int:
        if "multiprocessing.forkserver" not in arguments[-1]:
            return int(start_program(path, arguments, descriptors))
        reduction.sendfds(here, descriptors)  # type: ignore[attr-defined]
        return server

    util.spawnv_passfds = start  # type: ignore[attr-defined]


def _become_server(requests: socket.socket) -> None:
    try:
        with suppress(EOFError, SystemExit):  # the program has ended
            listener, alive = reduction.recvfds(requests, 2)  # type: ignore[attr-defined]
            requests.close()
            forkserver.main(listener, alive, [])  # type: ignore[attr-defined]
    finally:
        os._exit(0)
