"""The time left of a counted thing, by the speed at which it was counted so far."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Countdown"]


class Countdown:
    """Measures how fast something is counted.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._begun: tuple[float, int] | None = None  # time and number of the first counted steps

    def seconds_left(self, done: int, total: int) -> float | None:
        """Counts up to ``done``; returns the seconds until ``total``, or None while no speed is measured."""
        now = self._clock()
        if self._begun is None:
            if done:  # they may be an earlier attempt's, which says nothing about speed
                self._begun = now, done
            return None
        began_at, begun_with = self._begun
        return None if done == begun_with else (now - began_at) / (done - begun_with) * (total - done)
