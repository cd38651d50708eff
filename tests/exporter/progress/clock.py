"""A clock that a test turns."""

from __future__ import annotations


class Clock:
    """Stands still until somebody adds to ``now``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
