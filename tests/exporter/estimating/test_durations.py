"""Durations as people write and read them."""

from __future__ import annotations

import pytest

from exporter.estimating.durations import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "10 s"),
        (10, "10 s"),
        (10.5, "10 s"),
        (11, "20 s"),
        (49, "50 s"),
        (55, "1 min"),
        (60, "1 min"),
        (61, "2 min"),
        (59 * 60, "59 min"),
        (59 * 60 + 1, "1 h"),
        (100 * 60, "1 h 40 min"),
        (5 * 3600 - 1, "5 h"),
        (5.4 * 3600, "5 h"),
        (30 * 3600, "30 h"),
    ],
)
def test_estimates_are_coarse(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
