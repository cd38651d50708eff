"""The run's place and speed: adds to what a stage says its number in the run and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from exporter.progress.events import Advance, DoneAlready, Message, StageBegins, StageEnds, View
from exporter.progress.speed import Countdown

__all__ = ["RunProgress"]

_TRUSTED_SECONDS = 60
"""Estimates are corrected as if stages of this length had taken as long as they were estimated."""


class RunProgress:
    """Follows a run and tells a view what happens.

    A stage is known by the folder of its outputs: two parts of a run have stages of the same name, and share others.

    Args:
        view: shows the events.
        clock: returns the time in seconds.
    """

    def __init__(self, view: View, clock: Callable[[], float] = time.monotonic) -> None:
        self._view = view
        self._clock = clock
        self._to_come: dict[Path, float | None] = {}  # estimated seconds
        self._seen: set[Path] = set()
        self._estimated = self._measured = 0.0  # seconds of the finished stages that had an estimate
        self._stage: _RunningStage | None = None

    def say(self, text: str) -> None:
        """Tells people something."""
        self._view(Message(text))

    def expect(self, seconds: Mapping[Path, float | None]) -> None:
        """Replaces what is known about the stages to come: all of them, in any order, with their estimated seconds."""
        self._to_come = {stage: value for stage, value in seconds.items() if stage not in self._seen}

    def expect_also(self, stages: Iterable[Path], *, done: bool) -> None:
        """Adds stages that nobody expected yet: those that are done already take no time."""
        new = (stage for stage in stages if stage not in self._seen and stage not in self._to_come)
        self._to_come |= dict.fromkeys(new, 0.0 if done else None)

    def done_already(self, stage: Path, what: str) -> None:
        """An earlier attempt finished this stage; nothing is said if this run did it, or has said it before."""
        if stage not in self._seen:
            self._enter(stage)
            self._view(DoneAlready(stage.name, what, self._number, self._of))

    def begin(self, stage: Path, what: str) -> None:
        """A stage begins."""
        estimate = self._enter(stage)
        self._stage = _RunningStage(stage.name, what, estimate, self._clock)
        self._view(StageBegins(stage.name, what, self._number, self._of, self._run_seconds_left(None)))

    def advance(self, unit: str, done: int, total: int) -> None:
        """The stage that runs has done so many steps of one thing."""
        stage = self._stage
        assert stage is not None, "a stage has begun"
        left = stage.seconds_left(unit, done, total)
        self._view(Advance(stage.name, unit, done, total, left, self._run_seconds_left(left)))

    def end(self, seconds: float, peak_rss_bytes: int) -> None:
        """The stage that runs is finished."""
        stage = self._stage
        assert stage is not None, "a stage has begun"
        if stage.estimate:
            self._estimated += stage.estimate
            self._measured += seconds
        self._stage = None
        self._view(StageEnds(stage.name, stage.what, self._number, self._of, seconds, peak_rss_bytes))

    @property
    def _number(self) -> int:
        return len(self._seen)

    @property
    def _of(self) -> int:
        return len(self._seen) + len(self._to_come)

    def _enter(self, stage: Path) -> float | None:
        self._seen.add(stage)
        return self._to_come.pop(stage, None)

    def _run_seconds_left(self, of_counted: float | None) -> float | None:
        """Seconds until the run ends: estimates of the stages to come, corrected by those that were measured.

        Args:
            of_counted: the seconds until what the running stage counts is done, if that is measured.
        """
        estimates = [value for value in self._to_come.values() if value is not None]
        current = None if self._stage is None else self._stage.rest(of_counted, self._correction)
        if current is None or len(estimates) < len(self._to_come):
            return None
        return current + self._correction * sum(estimates)

    @property
    def _correction(self) -> float:
        """How much longer than estimated the finished stages took; short ones say little."""
        return (self._measured + _TRUSTED_SECONDS) / (self._estimated + _TRUSTED_SECONDS)


class _RunningStage:
    """The stage that runs: how long it has taken, and how fast it counts."""

    def __init__(self, name: str, what: str, estimate: float | None, clock: Callable[[], float]) -> None:
        self.name = name
        self.what = what
        self.estimate = estimate
        self._clock = clock
        self._began_at = clock()
        self._counted: list[tuple[str, int]] = []  # the things that it has counted: unit and number
        self._countdown = Countdown(clock)
        self._done = 0

    def seconds_left(self, unit: str, done: int, total: int) -> float | None:
        if done < self._done or (unit, total) not in self._counted[-1:]:  # it counts something else now
            self._counted.append((unit, total))
            self._countdown = Countdown(self._clock)
        self._done = done
        return self._countdown.seconds_left(done, total)

    def rest(self, of_counted: float | None, correction: float) -> float | None:
        """Seconds until it ends: what it counts is all that it does, as long as it has counted one thing only."""
        if len(self._counted) == 1 and of_counted is not None:
            return of_counted
        if self.estimate is None:
            return None
        by_estimate = max(0.0, correction * self.estimate - (self._clock() - self._began_at))
        return max(by_estimate, of_counted or 0.0)
