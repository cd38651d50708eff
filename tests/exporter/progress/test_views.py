"""The three ways to show a run: lines for a log, lines of JSON, and the picture on a terminal."""

from __future__ import annotations

import io
import json
import signal
import threading
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from exporter.cli import main
from exporter.progress.events import EVENTS, Advance, DoneAlready, Event, Message, StageBegins, StageEnds
from exporter.progress.run_progress import RunProgress
from exporter.progress.terminal import RunOnTerminal
from exporter.progress.views import PlainLines, json_lines, show_nothing
from tests.exporter.progress.clock import Clock

_REPOSITORY = Path(__file__).parents[3]


def _said(unit: str, counts: Sequence[tuple[float, int]], total: int) -> list[str]:
    """The lines of a stage that counts so much after so many seconds each."""
    clock, said = Clock(), list[str]()
    progress = RunProgress(PlainLines(said.append, clock), clock)
    progress.begin(Path("work/gguf"), "write")
    for seconds, done in counts:
        clock.now += seconds
        progress.advance(unit, done, total)
    assert said.pop(0) == "[1/1] write"
    return said


def test_a_line_a_minute_says_how_far_it_is_and_how_long_it_will_take() -> None:
    # layers after the first one, which was not timed, take 25 s each
    assert _said("layers", [(25, number) for number in range(1, 13)], 48) == [
        "      layers: 3 of 48, about 19 min left, about 19 min until the run ends",
        "      layers: 6 of 48, about 18 min left, about 18 min until the run ends",
        "      layers: 9 of 48, about 17 min left, about 17 min until the run ends",
        "      layers: 12 of 48, about 15 min left, about 15 min until the run ends",
    ]


def test_what_an_earlier_attempt_did_says_nothing_about_speed() -> None:
    assert _said("bytes", [(61, 3_000_000_000), (61, 3_500_000_000)], 4_000_000_000) == [
        "      3.0 GB (2.8 GiB) of 4.0 GB (3.7 GiB)",
        "      3.5 GB (3.3 GiB) of 4.0 GB (3.7 GiB), about 2 min left, about 2 min until the run ends",
    ]


def test_what_is_quick_or_done_is_not_commented() -> None:
    assert _said("steps", [(30, 1), (29, 2), (300, 3)], 3) == []


_EVENTS: Sequence[Event] = (
    Message("memory: enough"),
    DoneAlready("calibrate", "run the teacher", 1, 3),
    StageBegins("gguf", "write the GGUF file", 2, 3, 600.0),
    Advance("gguf", "bytes", 1_000_000_000, 4_000_000_000, 90.0, 540.0),
    StageEnds("gguf", "write the GGUF file", 2, 3, 120.4, 2_500_000_000),
)


def test_lines_of_json_are_the_documented_events() -> None:
    said: list[str] = []
    for event in _EVENTS:
        json_lines(said.append)(event)
    assert json.loads(said[3]) == {
        "event": "progress",
        "stage": "gguf",
        "unit": "bytes",
        "done": 1_000_000_000,
        "total": 4_000_000_000,
        "seconds_left": 90.0,
        "run_seconds_left": 540.0,
    }
    assert [json.loads(line)["event"] for line in said] == [type(event).event for event in _EVENTS]
    page = (_REPOSITORY / "docs" / "progress.md").read_text(encoding="utf-8")
    for kind in EVENTS:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{kind.event}` |"))
        assert row.split("`")[3::2] == [definition.name for definition in fields(kind)]


def _drawn(events: Sequence[Event]) -> str:
    """What a terminal is sent while these events happen."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=30, color_system=None)
    with RunOnTerminal(console) as view:
        for event in events:
            view(event)
            view.refresh()
    return screen.getvalue()


def test_a_terminal_shows_the_stage_and_the_whole_run() -> None:
    drawn = _drawn(_EVENTS[:4])
    for text in ("[2/3] write the GGUF file", "1.0 GB (953.7 MiB) of 4.0 GB", "about 2 min left", "about 9 min left"):
        assert text in drawn, drawn
    assert drawn.startswith("\x1b[?25l"), "the cursor is hidden"
    assert drawn.endswith("\x1b[?25h") or "\x1b[?25h" in drawn.split("so far")[-1], "and comes back"


def test_finished_stages_stay_on_the_terminal() -> None:
    done = "[1/3] run the teacher: done already"
    assert done in _drawn(_EVENTS[:2])
    assert "[2/3] write the GGUF file: 120 s, 2500 MB" in _drawn(_EVENTS)


def test_the_thread_that_draws_takes_no_signals() -> None:
    """Signals that wait while a process is started must find no thread that takes them."""
    before = set(threading.enumerate())
    with RunOnTerminal(Console(file=io.StringIO(), force_terminal=True)):
        (drawer,) = set(threading.enumerate()) - before
        assert drawer.native_id is not None
        status = Path(f"/proc/self/task/{drawer.native_id}/status").read_text()
        (blocked,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
        for number in (signal.SIGINT, signal.SIGTERM):
            assert int(blocked, 16) & 1 << number - 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for event in _EVENTS:
        show_nothing(event)
    assert capsys.readouterr() == ("", "")


def test_quiet_beside_json_is_refused() -> None:
    refused = CliRunner().invoke(main, ["--budget", "4MB", "--quiet", "--progress", "json"])
    assert refused.exit_code == 2
    assert refused.stderr == "error: --quiet: --progress json asks for progress; leave one of them out\n"
