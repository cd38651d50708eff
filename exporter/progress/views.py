"""Ways to show a run: lines of text, lines of JSON, and, on a terminal, a picture that is drawn again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from exporter.estimating.durations import format_duration
from exporter.estimating.sizes import format_size
from exporter.progress.events import BYTES, Advance, DoneAlready, Event, Message, StageBegins, StageEnds, View, as_data

__all__ = ["PlainLines", "counted", "finished", "json_lines", "show_nothing", "time_left", "view_on_stderr"]

_SECONDS_BETWEEN_LINES = 60


def counted(event: Advance) -> str:
    """How far a stage is, such as ``layers: 5 of 16``."""
    if event.unit == BYTES:
        return f"{format_size(event.done)} of {format_size(event.total)}"
    return f"{event.unit}: {event.done} of {event.total}"


def time_left(event: Advance) -> str:
    """The time left of what is counted and of the run, such as ``about 3 min left, of the run about 1 h``."""
    stage, run = event.seconds_left, event.run_seconds_left
    texts = ["" if stage is None else f"about {format_duration(stage)} left"]
    texts.append("" if run is None else f"about {format_duration(run)} until the run ends")
    return ", ".join(filter(None, texts))


def finished(event: StageEnds) -> str:
    """The cost of a stage."""
    return f"{event.seconds:.0f} s, {event.peak_rss_bytes / 1e6:.0f} MB"


class PlainLines:
    """Shows a run in lines of text: one when a stage begins, one when it ends, and one a minute while it runs.

    Args:
        say: prints a line.
        clock: returns the time in seconds.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._said_at = clock()

    def __call__(self, event: Event) -> None:
        """Shows an event."""
        line = self._advance(event) if isinstance(event, Advance) else self._line(event)
        if line:
            self._said_at = self._clock()
            self._say(line)

    def _line(self, event: Message | DoneAlready | StageBegins | StageEnds) -> str:
        match event:
            case Message():
                return event.text
            case DoneAlready():
                return f"[{event.number}/{event.of}] {event.what}: done already"
            case StageBegins():
                return f"[{event.number}/{event.of}] {event.what}"
            case StageEnds():
                return f"      {finished(event)}"

    def _advance(self, event: Advance) -> str:
        if self._clock() - self._said_at < _SECONDS_BETWEEN_LINES or event.done >= event.total:
            return ""
        return "      " + ", ".join(filter(None, (counted(event), time_left(event))))


def json_lines(say: Callable[[str], None]) -> View:
    """Shows each event as a line of JSON."""
    return lambda event: say(json.dumps(as_data(event), ensure_ascii=False))


def show_nothing(_event: Event) -> None:
    """Shows nothing."""


@contextmanager
def view_on_stderr(say: Callable[[str], None], *, quiet: bool, as_json: bool) -> Iterator[View]:
    """The view that the flags ask for, or one that suits the standard error: a terminal, or else a file or a pipe.

    Args:
        say: prints a line to the standard error.
        quiet: True shows nothing.
        as_json: True shows lines of JSON.
    """
    from rich.console import Console  # most commands show no progress

    console = Console(stderr=True, markup=False, highlight=False)
    if quiet:
        yield show_nothing
    elif as_json:
        yield json_lines(say)
    elif console.is_terminal:
        from exporter.progress.terminal import RunOnTerminal

        with RunOnTerminal(console) as view:
            yield view
    else:
        yield PlainLines(say)
