"""The statistics of ``llama-perplexity --kl-divergence``, with its definitions.

Source: ``kl_divergence`` in ``tools/perplexity/perplexity.cpp`` of llama.cpp. We have the same list, so
figures of that tool can be compared with the report. Errors are standard errors that assume independent positions,
which text does not have; :mod:`validate.metrics.bootstrap` gives intervals without that assumption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "Divergence",
    "PerplexityComparison",
    "ProbabilityChange",
    "compare_perplexities",
    "divergence",
    "perplexity",
    "probability_change",
    "share",
]

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class PerplexityComparison:
    """A model's perplexity Q and its reference's, base, at the same positions; each figure has an error."""

    base: float
    base_error: float
    correlation: float  # of ln Q and ln base, over positions; 0 if one of them never varies
    log_ratio: float  # ln(Q / base)
    log_ratio_error: float
    ratio: float  # Q / base
    ratio_error: float
    difference: float  # Q - base
    difference_error: float


@dataclass(frozen=True)
class Divergence:
    """KL divergence from a reference over the scored positions, in nats.

    A reference in 16 bits is up to 1.2e-4 nats off, so a position may even be a little below zero.
    """

    mean: float
    mean_error: float
    min: float
    p001: float  # 0.1 %
    p01: float
    p05: float
    p10: float
    median: float
    p90: float
    p95: float
    p99: float
    p999: float  # 99.9 %
    max: float


@dataclass(frozen=True)
class ProbabilityChange:
    """The model's probability of the right token minus the reference's, over the scored positions; 1 is certainty."""

    mean: float
    mean_error: float
    rms: float
    rms_error: float
    min: float
    p001: float  # 0.1 %
    p01: float
    p05: float
    p10: float
    p25: float
    median: float
    p75: float
    p90: float
    p95: float
    p99: float
    p999: float  # 99.9 %
    max: float


_SHARES = {
    "min": 0.0,
    "p001": 0.001,
    "p01": 0.01,
    "p05": 0.05,
    "p10": 0.1,
    "p25": 0.25,
    "median": 0.5,
    "p75": 0.75,
    "p90": 0.9,
    "p95": 0.95,
    "p99": 0.99,
    "p999": 0.999,
    "max": 1.0,
}


def perplexity(negative_log_likelihood_N: Floats) -> tuple[float, float]:
    """Perplexity and its standard error."""
    mean, error = _mean_and_error(negative_log_likelihood_N)
    value = float(np.exp(mean))
    return value, error * value


def compare_perplexities(negative_log_likelihood_N: Floats, reference_likelihood_N: Floats) -> PerplexityComparison:
    """Compares two models' negative log-likelihoods of the same tokens, both float32."""
    log_q, log_base = (float(v.mean(dtype=np.float64)) for v in (negative_log_likelihood_N, reference_likelihood_N))
    log_q_error = math.sqrt(_covariance_of_means(negative_log_likelihood_N, negative_log_likelihood_N))
    log_base_error = math.sqrt(_covariance_of_means(reference_likelihood_N, reference_likelihood_N))
    covariance = _covariance_of_means(negative_log_likelihood_N, reference_likelihood_N)
    both_errors = log_q_error * log_base_error
    q, base, ratio = np.exp([log_q, log_base, log_q - log_base]).tolist()
    q_error, base_error = q * log_q_error, base * log_base_error
    log_ratio_error = math.sqrt(max(0.0, log_q_error**2 + log_base_error**2 - 2 * covariance))
    return PerplexityComparison(
        base=base,
        base_error=base_error,
        correlation=covariance / both_errors if both_errors else 0.0,
        log_ratio=log_q - log_base,
        log_ratio_error=log_ratio_error,
        ratio=ratio,
        ratio_error=ratio * log_ratio_error,
        difference=q - base,
        difference_error=math.sqrt(max(0.0, q_error**2 + base_error**2 - 2 * q * base * covariance)),
    )


def divergence(kl_divergence_N: Floats) -> Divergence:
    """Summarises per-position divergences."""
    mean, error = _mean_and_error(kl_divergence_N)
    shares = {name: part for name, part in _SHARES.items() if name not in ("p25", "p75")}
    return Divergence(mean=mean, mean_error=error, **_percentiles(kl_divergence_N, shares))


def probability_change(negative_log_likelihood_N: Floats, reference_likelihood_N: Floats) -> ProbabilityChange:
    """Summarises how the right token's probability changed."""
    change_N = _probability(negative_log_likelihood_N) - _probability(reference_likelihood_N)
    mean, error = _mean_and_error(change_N)
    mean_square, square_error = _mean_and_error(change_N**2)
    rms = math.sqrt(mean_square)
    return ProbabilityChange(
        mean=mean,
        mean_error=error,
        rms=rms,
        rms_error=square_error / (2 * rms) if rms else 0.0,
        **_percentiles(change_N, _SHARES),
    )


def share(yes_N: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """The share of positions that are true, and its standard error."""
    found = float(yes_N.mean())
    return found, math.sqrt(found * (1 - found) / max(1, len(yes_N) - 1))


def _mean_and_error(values_N: Floats) -> tuple[float, float]:
    values = values_N.astype(np.float64)
    return float(values.mean()), math.sqrt(float(values.var()) / max(1, len(values) - 1))


def _covariance_of_means(first_N: Floats, second_N: Floats) -> float:
    """Computes it from plain sums of float32 products, as the tool does; at least 0 for one sequence with itself.

    Deviations from the means would be more exact. That shows only if a model is compared with itself: the errors of
    ratio and difference are then the rounding of these products, and our digits must be the tool's.
    """
    products = (first_N * second_N).mean(dtype=np.float64)
    covariance = float(products - first_N.mean(dtype=np.float64) * second_N.mean(dtype=np.float64))
    if first_N is second_N:
        covariance = max(0.0, covariance)
    return covariance / max(1, len(first_N) - 1)


def _probability(negative_log_likelihood_N: Floats) -> npt.NDArray[np.float32]:
    return np.exp(-negative_log_likelihood_N.astype(np.float64)).astype(np.float32)


def _percentiles(values_N: Floats, shares: Mapping[str, float]) -> dict[str, float]:
    """Interpolates between neighbours, except that the median of an even number is the mean of the middle two.

    The place between them is computed in float32, as in the tool: among 4,000 values that is 1.2e-4 of a step off,
    which shows in the sixth decimal where values lie far apart.
    """
    ordered = np.sort(values_N.astype(np.float32))
    last = len(ordered) - 1
    points = {}
    for name, fraction in shares.items():
        if name == "median":
            points[name] = float(np.float32(0.5) * (ordered[last // 2] + ordered[(last + 1) // 2]))
            continue
        place = np.float32(fraction) * np.float32(last)
        below = int(place)
        weight = place - np.float32(below)
        points[name] = float((np.float32(1) - weight) * ordered[below] + weight * ordered[min(below + 1, last)])
    return points
