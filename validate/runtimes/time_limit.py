"""Limits the time that a runtime may take for one call, so that a file cannot keep it busy for ever.

The limit is for a single step, such as loading a file or running a chunk, not for the whole run, so that slow machines
and large models are not stopped. The kernel's timer ends the process by SIGALRM (setitimer(2)), even while a library
holds Python's lock. Processes that it starts do not inherit the timer.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from validate.runtimes.cost import CHUNK_TOKENS

__all__ = ["limit_seconds", "patience", "set_limit", "tell", "working"]

_LEAST_SECONDS = 30.0
_BYTES_PER_SECOND = 10e6  # a file's bytes per second in the slowest step: a chunk of 512 tokens through all of them
_TIMES_THE_REFERENCE = 20


@dataclass
class _Limit:
    """The limit that was set for this process."""

    seconds: float
    tell: Callable[[str], None]
    depth: int = 0  # the depth of nested steps


_limit: _Limit | None = None


def patience(n_bytes: int, n_tokens: int = CHUNK_TOKENS, reference_seconds: float = 0.0) -> float:
    """Returns the seconds in which a working runtime finishes a step.

    Args:
        n_bytes: size of the file's weights.
        n_tokens: length of the chunk, or of the cache that is filled.
        reference_seconds: the time that another model of about this size took for such a chunk; 0 if it is not known.
    """
    times_longer = max(1.0, n_tokens / CHUNK_TOKENS)
    return times_longer * (_LEAST_SECONDS + n_bytes / _BYTES_PER_SECOND) + _TIMES_THE_REFERENCE * reference_seconds


def set_limit(seconds: float, tell: Callable[[str], None] = lambda _: None) -> None:
    """Sets a limit, after which SIGALRM ends this process; by default there is none.

    Args:
        seconds: the limit for one step.
        tell: is called with a description of each step, for the process that waits for this one.
    """
    global _limit  # the kernel has one such timer for a process
    _limit = _Limit(seconds, tell)


def limit_seconds() -> float | None:
    """The limit that was set; None if there is none."""
    return None if _limit is None else _limit.seconds


def tell(what: str) -> None:
    """Announces the next step, such as ``loading it``."""
    if _limit is not None:
        _limit.tell(what)


@contextmanager
def working() -> Iterator[None]:
    """Marks one step. When a step ends inside another, the time of the outer one starts again: there was progress."""
    limit = _limit
    if limit is None:
        yield
        return
    limit.depth += 1
    signal.setitimer(signal.ITIMER_REAL, limit.seconds)
    try:
        yield
    finally:
        limit.depth -= 1
        signal.setitimer(signal.ITIMER_REAL, limit.seconds if limit.depth else 0)
