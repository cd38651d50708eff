"""A limit on the time in which a process may finish nothing, so that a file cannot keep a runtime busy for ever.

Slow machines and large models are not to be ended: what counts is the time since a call of the runtime last came back,
not that since the beginning. The kernel's timer ends the process by SIGALRM (setitimer(2)), whatever it is doing, and
whoever holds Python's lock; a process that was started by another program does not have that one's timer.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["TimeLimit", "begin", "patience", "renew", "seconds", "start", "suspended"]

_LEAST_SECONDS = 30.0
_BYTES_PER_SECOND = 10e6  # of a file's bytes, in the slowest step: a chunk of 512 tokens through all of them
_CHUNK_TOKENS = 512
_TIMES_THE_REFERENCE = 20


@dataclass
class TimeLimit:
    """The limit that this process has."""

    seconds: float
    tell: Callable[[str], None]  # is told what begins


_limit: TimeLimit | None = None


def patience(n_bytes: int, n_tokens: int = _CHUNK_TOKENS, reference_seconds: float = 0.0) -> float:
    """Seconds in which an honest runtime finishes a step: loading a file, or running a chunk.

    Args:
        n_bytes: of the file's weights.
        n_tokens: of the chunk, or of the cache that is filled.
        reference_seconds: what another model of about this size took for such a chunk, if it is known.
    """
    times_longer = max(1.0, n_tokens / _CHUNK_TOKENS)
    return times_longer * (_LEAST_SECONDS + n_bytes / _BYTES_PER_SECOND) + _TIMES_THE_REFERENCE * reference_seconds


def start(limit: float, tell: Callable[[str], None] = lambda _: None) -> None:
    """From now on this process ends by SIGALRM when ``limit`` seconds pass without :func:`renew` or :func:`begin`."""
    global _limit  # the kernel has one such timer for a process
    _limit = TimeLimit(limit, tell)
    renew()


def seconds() -> float | None:
    """The limit that was set; None if there is none."""
    return None if _limit is None else _limit.seconds


def begin(what: str) -> None:
    """Another step begins, such as ``loading it``: whoever started this process is told."""
    if _limit is not None:
        _limit.tell(what)
    renew()


def renew() -> None:
    """Something was finished; without a limit nothing happens."""
    if _limit is not None:
        signal.setitimer(signal.ITIMER_REAL, _limit.seconds)


@contextmanager
def suspended() -> Iterator[None]:
    """While it lasts, nothing is asked of this process: it waits for one that has a limit of its own."""
    if _limit is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        renew()
