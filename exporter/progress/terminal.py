"""Shows a run on a terminal: above, a line for each stage that is finished; below, the stage that runs and the rest."""

from __future__ import annotations

import signal
import time
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from exporter.estimating.durations import format_duration
from exporter.progress.events import Advance, DoneAlready, Event, Message, StageBegins, StageEnds
from exporter.progress.views import counted, finished

__all__ = ["RunOnTerminal"]

_BAR_WIDTH = 24
_COLUMNS = 4


class RunOnTerminal:
    """Draws the run; use it in a ``with`` statement, which leaves the finished lines and the cursor.

    It draws in a thread, a few times a second. That thread takes no signals: Ctrl-C must reach the main thread, which
    lets it wait while a process is started.
    """

    def __init__(self, console: Console) -> None:
        self._began_at = self._told_at = time.monotonic()
        self._stage: StageBegins | None = None
        self._advance: Advance | None = None
        self._live = Live(console=console, get_renderable=self._picture, transient=True, redirect_stdout=False)

    def __enter__(self) -> RunOnTerminal:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # threads inherit it
        try:
            self._live.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stage = None
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Shows an event."""
        match event:
            case Message():
                self._live.console.print(event.text, soft_wrap=True)
            case DoneAlready():
                self._print_finished(event, "done already")
            case StageBegins():
                self._stage, self._advance = event, None
            case Advance():
                self._advance = event
            case StageEnds():
                self._stage = None
                self._print_finished(event, finished(event))
        self._told_at = time.monotonic()

    def refresh(self) -> None:
        """Draws now."""
        self._live.refresh()

    def _print_finished(self, event: DoneAlready | StageEnds, how: str) -> None:
        self._live.console.print(f"[{event.number}/{event.of}] {event.what}: {how}", soft_wrap=True)

    def _picture(self) -> RenderableType:
        stage, advance = self._stage, self._advance  # an event may change them while this draws
        if stage is None:
            return ""
        lines = Table.grid(padding=(0, 2))
        for _ in range(_COLUMNS):
            lines.add_column(no_wrap=True)
        since = time.monotonic() - self._told_at
        if advance is not None:
            bar = ProgressBar(total=advance.total, completed=advance.done, width=_BAR_WIDTH)
            lines.add_row("     ", bar, counted(advance), _about(advance.seconds_left, since))
        whole = ProgressBar(total=stage.of, completed=stage.number - 1 + _share(advance), width=_BAR_WIDTH)
        left = stage.run_seconds_left if advance is None else advance.run_seconds_left
        passed = format_duration(time.monotonic() - self._began_at)
        lines.add_row("  run", whole, f"{passed} so far", _about(left, since))
        return Group(f"[{stage.number}/{stage.of}] {stage.what}", lines)


def _share(advance: Advance | None) -> float:
    return 0.0 if advance is None or not advance.total else min(1.0, advance.done / advance.total)


def _about(seconds: float | None, since: float) -> str:
    """The time left, ``since`` seconds after it was estimated."""
    return "" if seconds is None else f"about {format_duration(max(0.0, seconds - since))} left"
