"""Counts what a stage's process does, and tells the run, which shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Count", "Progress"]

_SECONDS_BETWEEN_COUNTS = 0.2

Count = Callable[[str, int, int], None]
"""Takes the unit of what is counted, the number of units that are done, and their total."""


def _untold(_unit: str, _done: int, _total: int) -> None:
    """Tells nobody."""


class Progress:
    """Counts one thing at a time.

    Args:
        tell: is called with each count, but not more often than a person can see.
        clock: returns the time in seconds.
    """

    def __init__(self, tell: Count = _untold, clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock

    @contextmanager
    def bar(self, unit: str, total: int) -> Iterator[Callable[[int], None]]:
        """Counts ``total`` steps, layers or ``bytes``; yields the function that is called with the next ones."""
        counter = _Counter(unit, total, self._tell, self._clock)
        yield counter.advance


class _Counter:
    """Tells the first count, the last, and between them some."""

    def __init__(self, unit: str, total: int, tell: Count, clock: Callable[[], float]) -> None:
        self._unit, self._total = unit, total
        self._tell = tell
        self._clock = clock
        self._done = 0
        self._told_at = clock()
        tell(unit, 0, total)

    def advance(self, steps: int) -> None:
        """Counts steps that were done."""
        if not steps:
            return
        is_first = self._done == 0
        self._done += steps
        now = self._clock()
        if is_first or self._done >= self._total or now - self._told_at >= _SECONDS_BETWEEN_COUNTS:
            self._told_at = now
            self._tell(self._unit, self._done, self._total)
