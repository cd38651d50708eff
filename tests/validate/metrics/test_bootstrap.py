"""Block-bootstrap intervals: against scipy's, against theory, and against ignoring the blocks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from validate.metrics.bootstrap import bootstrap_interval, mean_interval, perplexity_interval


def test_interval_of_a_mean_is_scipy_s() -> None:
    values_BN = np.random.default_rng(1).gamma(1.0, 0.3, (40, 25))
    expected = bootstrap(
        (values_BN.mean(1),), np.mean, n_resamples=20_000, method="percentile", random_state=np.random.default_rng(5)
    ).confidence_interval
    width = expected.high - expected.low
    found = mean_interval(values_BN.ravel(), 40)
    assert found == pytest.approx((expected.low, expected.high), abs=0.05 * width)
    assert found == mean_interval(values_BN.ravel(), 40), "the draws are seeded"


def test_interval_of_a_ratio_is_scipy_s() -> None:
    """Blocks that count differently, as chunks of which only some tokens tell something."""
    generator = np.random.default_rng(2)
    weights_B = generator.integers(1, 50, 30).astype(np.float64)
    sums_B = weights_B * generator.uniform(0.2, 0.9, 30)
    expected = bootstrap(
        (sums_B, weights_B),
        lambda sums, weights, axis: sums.sum(axis) / weights.sum(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        random_state=np.random.default_rng(6),
    ).confidence_interval
    found = bootstrap_interval(30, lambda draws_DB: draws_DB @ sums_B / (draws_DB @ weights_B))
    assert found == pytest.approx((expected.low, expected.high), abs=0.05 * (expected.high - expected.low))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """95 % of 400 texts of 60 independent blocks; a binomial share of 400 lies within 0.03 of it."""
    generator = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        low, high = mean_interval(generator.normal(2.0, 1.0, 60), 60) or (0.0, 0.0)
        held += low <= 2.0 <= high
    assert held / 400 == pytest.approx(0.94, abs=0.03)


def test_positions_that_go_together_do_not_narrow_the_interval() -> None:
    """Ten copies of each value tell no more than one; taken as independent they would seem to."""
    values_B = np.random.default_rng(4).normal(0.0, 1.0, 50)
    copies_N = np.repeat(values_B, 10)
    assert mean_interval(copies_N, 50) == pytest.approx(mean_interval(values_B, 50))
    (low, high), (few_low, few_high) = (mean_interval(copies_N, n) or (0.0, 0.0) for n in (500, 50))
    assert high - low < 0.5 * (few_high - few_low)


def test_perplexity_s_interval_is_that_of_its_logarithm() -> None:
    values_N = np.random.default_rng(5).gamma(2.0, 1.5, 300)
    of_logs, found = mean_interval(values_N, 20), perplexity_interval(values_N, 20)
    assert of_logs is not None and found is not None
    assert np.log(found) == pytest.approx(of_logs)
    assert found[0] < np.exp(values_N.mean()) < found[1]


def test_one_block_tells_nothing_about_others() -> None:
    assert mean_interval(np.ones(255), 1) is None
    assert perplexity_interval(np.ones(255), 1) is None


def test_shares_of_positions_have_intervals_too() -> None:
    low, high = mean_interval(np.array([True, False] * 100 + [True] * 200), 20) or (0.0, 0.0)
    assert low < 0.75 < high
