"""Progress where there is no terminal: a line a minute."""

from __future__ import annotations

from exporter.processes.progress import ProgressLines


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_line_a_minute_says_how_far_it_is_and_how_long_it_will_take() -> None:
    clock, said = _Clock(), list[str]()
    lines = ProgressLines("layers", 48, said.append, clock)
    for _ in range(12):
        clock.now += 25
        lines.advance(1)
    # layers after the first one, which was not timed, take 25 s each
    assert said == [
        "      layers: 3 of 48, about 19 min left",
        "      layers: 6 of 48, about 18 min left",
        "      layers: 9 of 48, about 17 min left",
        "      layers: 12 of 48, about 15 min left",
    ]


def test_what_an_earlier_attempt_did_says_nothing_about_speed() -> None:
    clock, said = _Clock(), list[str]()
    lines = ProgressLines("bytes", 4_000_000_000, said.append, clock)
    clock.now += 61
    lines.advance(3_000_000_000)
    clock.now += 61
    lines.advance(500_000_000)
    assert said == [
        "      3.0 GB (2.8 GiB) of 4.0 GB (3.7 GiB)",
        "      3.5 GB (3.3 GiB) of 4.0 GB (3.7 GiB), about 2 min left",
    ]


def test_what_is_quick_or_done_is_not_commented() -> None:
    clock, said = _Clock(), list[str]()
    lines = ProgressLines("steps", 3, said.append, clock)
    for seconds in (30, 29, 300):
        clock.now += seconds
        lines.advance(1)
    assert said == []
