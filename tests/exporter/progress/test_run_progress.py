"""The place of a stage in the run, and the time that is left by what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.processes.progress import Progress
from exporter.progress.events import Advance, DoneAlready, Event, StageBegins, StageEnds
from exporter.progress.run_progress import RunProgress
from tests.exporter.progress.clock import Clock

_CALIBRATE, _COMPRESS, _WRITE = (Path("work") / name for name in ("calibrate", "compress", "gguf"))


def _followed(clock: Clock) -> tuple[RunProgress, list[Event]]:
    events: list[Event] = []
    return RunProgress(events.append, clock), events


def test_the_time_left_follows_the_measured_speed() -> None:
    clock = Clock()
    progress, events = _followed(clock)
    progress.expect({_CALIBRATE: 10.0, _COMPRESS: 100.0, _WRITE: 50.0})
    progress.begin(_CALIBRATE, "calibrate")
    assert events[-1] == StageBegins("calibrate", "calibrate", 1, 3, 160.0)
    progress.advance("layers", 0, 6)
    progress.advance("layers", 2, 6)  # an earlier attempt's
    clock.now += 4
    progress.advance("layers", 4, 6)
    # two layers in 4 s; nothing was measured of the stages to come
    assert events[-1] == Advance("calibrate", "layers", 4, 6, 4.0, 154.0)
    clock.now += 16
    progress.end(20.0, 1000)
    assert events[-1] == StageEnds("calibrate", "calibrate", 1, 3, 20.0, 1000)
    progress.begin(_COMPRESS, "compress")
    # it took twice as long as estimated; beside a trusted minute that makes all others a seventh longer
    assert events[-1] == StageBegins("compress", "compress", 2, 3, pytest.approx(150 * 8 / 7))


def test_a_stage_that_counts_several_things_ends_when_its_estimate_says() -> None:
    clock = Clock()
    progress, events = _followed(clock)
    progress.expect({_COMPRESS: 100.0})
    progress.begin(_COMPRESS, "compress")
    for total in (4, 8):
        progress.advance("layers", 0, total)
        for done in (1, 2):
            clock.now += 1
            progress.advance("layers", done, total)
    assert events[-1] == Advance("compress", "layers", 2, 8, 6.0, 96.0)


def test_a_stage_of_several_parts_is_counted_and_told_once() -> None:
    progress, events = _followed(Clock())
    progress.expect({_CALIBRATE: 1.0, _COMPRESS: 1.0})
    progress.begin(_CALIBRATE, "calibrate")
    progress.end(1.0, 0)
    # the search found that two files need stages of their own
    progress.expect({_CALIBRATE: 1.0, _COMPRESS: 1.0, _WRITE: 1.0})
    n_events = len(events)
    progress.done_already(_CALIBRATE, "calibrate")
    assert len(events) == n_events
    progress.done_already(_COMPRESS, "compress")
    assert events[-1] == DoneAlready("compress", "compress", 2, 3)


def test_what_nobody_estimated_leaves_the_time_open() -> None:
    progress, events = _followed(Clock())
    progress.expect_also([_CALIBRATE], done=True)
    progress.expect_also([_COMPRESS], done=False)
    progress.done_already(_CALIBRATE, "calibrate")
    progress.begin(_COMPRESS, "compress")
    assert events[-1] == StageBegins("compress", "compress", 2, 2, None)


def test_a_process_tells_no_more_than_a_person_can_see() -> None:
    clock = Clock()
    told: list[tuple[str, int, int]] = []
    with Progress(lambda *count: told.append(count), clock).bar("bytes", 100) as advance:
        for _ in range(100):
            clock.now += 0.01
            advance(1)
    assert told[:2] == [("bytes", 0, 100), ("bytes", 1, 100)], "the first steps may be an earlier attempt's"
    assert told[-1] == ("bytes", 100, 100)
    assert 5 <= len(told) <= 8
