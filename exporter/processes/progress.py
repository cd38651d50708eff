"""Shows a stage's progress on stderr: a bar on a terminal; elsewhere, such as in a log, a line a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

from exporter.estimating.durations import format_duration
from exporter.estimating.sizes import format_size

__all__ = ["Progress", "ProgressLines", "restore_terminal"]

_SECONDS_BETWEEN_LINES = 60
_BYTES = "bytes"


class Progress:
    """Makes one bar at a time; a ``silent`` one shows nothing."""

    def __init__(self, *, silent: bool = False) -> None:
        self._console = Console(stderr=True, quiet=silent)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of ``total`` steps, layers or ``bytes``; yields the function that advances it."""
        if not self._console.is_terminal:
            yield ProgressLines(what, total, lambda line: self._console.print(line, highlight=False)).advance
            return
        from rich import progress as rich_progress  # plans import this module too, and show no bar

        count = rich_progress.DownloadColumn() if what == _BYTES else rich_progress.MofNCompleteColumn()
        description, left = rich_progress.TextColumn("  {task.description}"), rich_progress.TimeRemainingColumn()
        columns = (description, rich_progress.BarColumn(), count, left)
        with rich_progress.Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda steps: progress.advance(task, steps)


class ProgressLines:
    """Reports progress, at most once a minute.

    Args:
        what: the name of the things that are counted.
        total: the number of them.
        say: prints a line.
        clock: returns the time in seconds.
    """

    def __init__(
        self, what: str, total: int, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._total = total
        self._say = say
        self._clock = clock
        self._done = 0
        self._said_at = clock()
        self._begun: tuple[float, int] | None = None  # time and number of the first counted steps

    def advance(self, steps: int) -> None:
        """Counts steps that were done."""
        self._done += steps
        now = self._clock()
        if self._begun is None:  # they may be an earlier attempt's, which says nothing about speed
            self._begun = now, self._done
        if now - self._said_at >= _SECONDS_BETWEEN_LINES and self._done < self._total:
            self._said_at = now
            self._say(f"      {self._position()}{self._time_left(now)}")

    def _position(self) -> str:
        if self._what == _BYTES:
            return f"{format_size(self._done)} of {format_size(self._total)}"
        return f"{self._what}: {self._done} of {self._total}"

    def _time_left(self, now: float) -> str:
        assert self._begun is not None
        start, done = self._begun
        if self._done == done:
            return ""
        return f", about {format_duration((now - start) / (self._done - done) * (self._total - self._done))} left"


def restore_terminal() -> None:
    """Removes the rest of a bar whose process was ended while it drew."""
    console = Console(stderr=True)
    if console.is_terminal:
        console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)), Control.show_cursor(True))
