"""Intervals by block bootstrap: how far a figure would move on other text of the same kind.

Positions of one chunk are not independent, but chunks nearly are: whole chunks are drawn, with replacement, and the
figure is computed from each draw. The interval holds the middle 95 % of those (percentile method; B. Efron, R. J.
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). With few chunks it is too narrow, as any interval is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = [
    "CONFIDENCE",
    "Interval",
    "bootstrap_interval",
    "mean_interval",
    "perplexity_interval",
    "perplexity_ratio_interval",
]

CONFIDENCE = 0.95
"""The share of draws that an interval holds."""

_DRAWS = 5000
_SEED = 42

Interval = tuple[float, float]
"""Lower and upper end."""

Floats = npt.NDArray[np.float64]


def bootstrap_interval(n_blocks: int, statistic: Callable[[Floats], Floats]) -> Interval | None:
    """The interval of any figure that can be computed from sums over blocks.

    Args:
        n_blocks: B, the number of blocks of the text.
        statistic: gets the times that each draw (D) took each block, float64 [D, B], and returns its figures, [D].

    Returns:
        None for a single block, which says nothing about others.
    """
    if n_blocks < 2:
        return None
    draws_DB = np.random.default_rng(_SEED).multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), _DRAWS)
    margin = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(statistic(draws_DB.astype(np.float64)), [margin, 100 - margin])
    return float(low), float(high)


def mean_interval(values_N: npt.NDArray[np.generic], n_blocks: int) -> Interval | None:
    """The interval of the mean of values that come in blocks of equal length, one after the other."""
    means_B = values_N.reshape(n_blocks, -1).mean(axis=1, dtype=np.float64)
    return bootstrap_interval(n_blocks, lambda draws_DB: draws_DB @ means_B / n_blocks)


def perplexity_interval(negative_log_likelihood_N: npt.NDArray[np.generic], n_blocks: int) -> Interval | None:
    """The interval of the perplexity."""
    of_logs = mean_interval(negative_log_likelihood_N, n_blocks)
    return None if of_logs is None else (float(np.exp(of_logs[0])), float(np.exp(of_logs[1])))


def perplexity_ratio_interval(
    negative_log_likelihood_N: npt.NDArray[np.generic], reference_likelihood_N: npt.NDArray[np.generic], n_blocks: int
) -> Interval | None:
    """The interval of the ratio of two models' perplexities on the same text; both get the same draws."""
    differences_N = negative_log_likelihood_N.astype(np.float64) - reference_likelihood_N.astype(np.float64)
    return perplexity_interval(differences_N, n_blocks)
