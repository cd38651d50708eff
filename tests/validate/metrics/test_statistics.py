"""llama-perplexity's statistics, against its C++ written out once more in plain Python."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from validate.metrics.statistics import compare_perplexities, divergence, perplexity, probability_change, share

Floats = npt.NDArray[np.float32]

_FRACTIONS = {
    "p001": 0.001,
    "p01": 0.01,
    "p05": 0.05,
    "p10": 0.1,
    "p25": 0.25,
    "p75": 0.75,
    "p90": 0.9,
    "p95": 0.95,
    "p99": 0.99,
    "p999": 0.999,
}


def _mean_and_uncertainty(values: list[float], squares: list[float]) -> tuple[float, float]:
    """``mean_and_uncertainty`` of ``kl_divergence`` in tools/perplexity/perplexity.cpp, from plain sums."""
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum(squares) / count - mean * mean
    return mean, math.sqrt(variance / (count - 1)) if variance > 0 else 0.0


def _products(first: list[float], second: list[float]) -> list[float]:
    """``nll*nll`` and ``nll*nll_base`` are float."""
    return [float(np.float32(a) * np.float32(b)) for a, b in zip(first, second, strict=True)]


def _covariance(first: list[float], second: list[float]) -> float:
    count = len(first)
    products = math.fsum(_products(first, second)) / count
    return (products - math.fsum(first) / count * (math.fsum(second) / count)) / (count - 1)


def _percentiles(values_N: Floats) -> dict[str, float]:
    """``percentile`` and the medians: everything in float."""
    values = sorted(values_N.tolist())
    found = {"min": values[0], "max": values[-1]}
    for name, fraction in _FRACTIONS.items():
        p = np.float32(fraction) * np.float32(len(values) - 1)
        index = int(p)
        p -= np.float32(index)
        after = values[min(index + 1, len(values) - 1)]
        found[name] = float((np.float32(1) - p) * np.float32(values[index]) + p * np.float32(after))
    middle = len(values) // 2
    found["median"] = values[middle] if len(values) % 2 else 0.5 * (values[middle] + values[middle - 1])
    return found


@pytest.fixture(scope="module", params=[3060, 3061])
def likelihoods(request: pytest.FixtureRequest) -> tuple[Floats, Floats]:
    """A model's and its reference's, of the same tokens: nearly alike, as after quantization."""
    generator = np.random.default_rng(7)
    base = generator.gamma(1.3, 3.0, request.param)
    model = np.abs(base + generator.normal(0, 0.08, request.param) * (1 + base))
    return model.astype(np.float32), base.astype(np.float32)


def test_perplexities_are_compared_as_by_llama_perplexity(likelihoods: tuple[Floats, Floats]) -> None:
    q, base = (values.tolist() for values in likelihoods)
    (log_q, q_error), (log_base, base_error) = (_mean_and_uncertainty(v, _products(v, v)) for v in (q, base))
    covariance = _covariance(q, base)
    ratio_error = math.sqrt(q_error**2 + base_error**2 - 2 * covariance)
    value, value_base = math.exp(log_q), math.exp(log_base)
    expected = {
        "base": value_base,
        "base_error": value_base * base_error,
        "correlation": covariance / (q_error * base_error),
        "log_ratio": log_q - log_base,
        "log_ratio_error": ratio_error,
        "ratio": math.exp(log_q - log_base),
        "ratio_error": math.exp(log_q - log_base) * ratio_error,
        "difference": value - value_base,
        "difference_error": math.sqrt(
            (value * q_error) ** 2 + (value_base * base_error) ** 2 - 2 * value * value_base * covariance
        ),
    }
    assert asdict(compare_perplexities(*likelihoods)) == pytest.approx(expected, rel=1e-7)
    assert perplexity(likelihoods[0]) == pytest.approx((value, value * q_error), rel=1e-6)
    assert 0.9 < expected["correlation"] < 0.9999


def test_divergences_are_summarised_as_by_llama_perplexity(likelihoods: tuple[Floats, Floats]) -> None:
    values_N = (np.abs(likelihoods[0] - likelihoods[1]) ** 2).astype(np.float32)
    values = values_N.tolist()
    mean, error = _mean_and_uncertainty(values, [x * x for x in values])
    expected: dict[str, Any] = {"mean": mean, "mean_error": error} | _percentiles(values_N)
    del expected["p25"], expected["p75"]
    assert asdict(divergence(values_N)) == pytest.approx(expected, rel=1e-7)


def test_probabilities_of_the_right_token_are_compared_as_by_llama_perplexity(
    likelihoods: tuple[Floats, Floats],
) -> None:
    p, p_base = (np.exp(-values.astype(np.float64)).astype(np.float32) for values in likelihoods)
    change_N = p - p_base
    squares = (change_N * change_N).tolist()
    mean, error = _mean_and_uncertainty(change_N.tolist(), squares)
    mean_square, square_error = _mean_and_uncertainty(squares, [x * x for x in squares])
    rms = math.sqrt(mean_square)
    expected: dict[str, Any] = {"mean": mean, "mean_error": error, "rms": rms, "rms_error": 0.5 / rms * square_error}
    assert asdict(probability_change(*likelihoods)) == pytest.approx(expected | _percentiles(change_N), rel=1e-6)


def test_same_top_has_the_error_of_a_share() -> None:
    assert share(np.array([True, True, True, False])) == pytest.approx((0.75, math.sqrt(0.75 * 0.25 / 3)))


def test_percentiles_by_hand() -> None:
    """0, 1, ..., 1000 in any order: percentile q is 10 q."""
    found = divergence(np.random.default_rng(0).permutation(1001).astype(np.float32))
    assert (found.min, found.median, found.max) == (0, 500, 1000)
    assert (found.p001, found.p10, found.p90, found.p999) == pytest.approx((1, 100, 900, 999), abs=1e-3)
    assert divergence(np.array([0.0, 1.0], np.float32)).p90 == pytest.approx(0.9)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    value, error = perplexity(np.full(40, np.log(4096), np.float32))
    assert value == pytest.approx(4096, rel=1e-6)
    assert error == 0.0


def test_perplexity_and_its_error_by_hand() -> None:
    """Mean 2, variance (1 + 0 + 1) / 3, error of the mean sqrt(2/3 / 2); the perplexity's is exp(2) times that."""
    value, error = perplexity(np.array([1.0, 2.0, 3.0], np.float32))
    assert value == pytest.approx(7.38905609893065)
    assert error == pytest.approx(7.38905609893065 * np.sqrt(1 / 3))


def test_perplexity_sums_in_double_precision() -> None:
    """A million values of 5 with a tiny part that float32 sums would lose."""
    value, _ = perplexity(np.full(1_000_000, 5.000001, np.float32))
    assert value == pytest.approx(np.exp(float(np.float32(5.000001))), rel=1e-12)


def test_a_model_beside_itself_differs_in_nothing() -> None:
    values_N = np.random.default_rng(3).gamma(1.0, 3.0, 500).astype(np.float32)
    compared, changed = compare_perplexities(values_N, values_N), probability_change(values_N, values_N)
    assert compared.correlation == pytest.approx(1)
    assert (compared.log_ratio, compared.ratio, compared.difference) == (0, 1, 0)
    assert compared.log_ratio_error == pytest.approx(0, abs=1e-8)
    assert (changed.rms, changed.rms_error, changed.max) == (0, 0, 0)


def test_a_single_position_has_no_error() -> None:
    one = np.array([1.0], np.float32)
    assert perplexity(one) == pytest.approx((math.e, 0.0))
    assert compare_perplexities(one, one).correlation == 0
    assert share(np.array([True])) == (1.0, 0.0)
