"""What counts as a loop."""

from __future__ import annotations

import numpy as np
import pytest

from validate.repetition import ends_in_a_loop

_TEXT = list(range(100, 150))  # no token twice


@pytest.mark.parametrize("cycle", range(1, 17))
def test_a_cycle_three_times_over_is_a_loop(cycle: int) -> None:
    """At least 8 tokens in all, so short cycles need more rounds."""
    rounds = max(3, -(-8 // cycle))
    assert ends_in_a_loop(_TEXT + list(range(cycle)) * rounds)


@pytest.mark.parametrize("cycle", range(1, 17))
def test_one_token_less_is_not(cycle: int) -> None:
    shortest = max(3 * cycle, 8)
    looping = (list(range(cycle)) * 8)[:shortest]
    assert ends_in_a_loop(_TEXT + looping)
    assert not ends_in_a_loop(_TEXT + looping[1:])


def test_a_longer_cycle_is_not_looked_for() -> None:
    assert not ends_in_a_loop(list(range(17)) * 3)


@pytest.mark.parametrize("shift", range(5))
def test_it_does_not_matter_where_in_the_cycle_the_text_ends(shift: int) -> None:
    assert ends_in_a_loop(_TEXT + (list(range(5)) * 4)[: 15 + shift])


def test_a_loop_that_the_text_got_out_of_does_not_count() -> None:
    assert not ends_in_a_loop([7] * 40 + _TEXT)
    assert not ends_in_a_loop([7] * 40 + [8])


@pytest.mark.parametrize("position", range(-15, 0))
def test_one_different_token_breaks_it(position: int) -> None:
    tokens = _TEXT + [0, 1, 2, 3, 4] * 3
    tokens[position] = 99
    assert not ends_in_a_loop(tokens)


@pytest.mark.parametrize("tokens", [[], [1], [1] * 7, [1, 2] * 3, _TEXT, [1, 1, 2, 2, 1, 1, 2, 3]])
def test_what_is_no_loop(tokens: list[int]) -> None:
    assert not ends_in_a_loop(tokens)


def test_random_text_hardly_ever_loops() -> None:
    generator = np.random.default_rng(0)
    loops = sum(ends_in_a_loop(generator.integers(0, 50, 64).tolist()) for _ in range(2000))
    assert loops == 0
