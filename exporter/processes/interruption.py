"""Handles requests to stop: Ctrl-C (SIGINT) and SIGTERM both end a run with one sentence and no stack trace."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Terminated", "exit_code", "ignore_further_requests", "requests_wait", "sigterm_raises"]


_REQUESTS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. Code that cleans up after Ctrl-C cleans up after this too."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """While it lasts, SIGTERM raises :class:`Terminated` in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread handles signals
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def requests_wait() -> Iterator[None]:
    """While it lasts, SIGINT and SIGTERM wait; then the first that arrived has its usual effect.

    For imports: a C++ library that meets an exception while it loads ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in _REQUESTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if arrived:
        signal.raise_signal(arrived[0])


def ignore_further_requests() -> None:
    """Ignores further requests while the process ends: a second Ctrl-C must not interrupt that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def exit_code(request: KeyboardInterrupt) -> int:
    """The exit code that shells expect: 128 + the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(request, Terminated) else signal.SIGINT)


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise Terminated
