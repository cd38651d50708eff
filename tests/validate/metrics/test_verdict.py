"""Pass or fail: thresholds are inclusive, requirements replace defaults, and missing figures fail."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from validate.metrics.generation import largest_share_by_chance
from validate.metrics.verdict import BANDS, REQUIREMENTS, Check, Figures, band_of, required_checks

_PERFECT: dict[str, float] = {"kld": 0.0, "top1": 1.0, "routing": 1.0, "perplexity_change": 0.0, "loops": 0.0}


def _checks(
    artifact: str,
    bits: float,
    require: dict[str, float],
    *,
    routed: bool = True,
    whole: bool = False,
    **found: Any,
) -> list[Check]:
    figures = Figures(**_PERFECT | found)
    return required_checks(artifact, band_of(bits).fidelity, require, figures, is_routed=routed, is_whole=whole)


@pytest.mark.parametrize(("value", "passed"), [(0.0, True), (0.5, True), (0.500001, False), (math.inf, False)])
def test_at_most_includes_the_threshold(value: float, passed: bool) -> None:
    assert Check.at_most("x", value, 0.5) == Check("x", value, 0.5, passed)


@pytest.mark.parametrize(("value", "passed"), [(1.0, True), (0.5, True), (0.499999, False), (-math.inf, False)])
def test_at_least_includes_the_threshold(value: float, passed: bool) -> None:
    assert Check.at_least("x", value, 0.5) == Check("x", value, 0.5, passed)


@pytest.mark.parametrize("value", [None, math.nan])
def test_what_was_not_measured_fails(value: float | None) -> None:
    assert not Check.at_most("x", value, 0.5).passed
    assert not Check.at_least("x", value, 0.5).passed


def test_the_defaults_are_those_of_the_type() -> None:
    checks = _checks("gguf", 4.5, {})
    assert [(check.name, check.threshold, check.passed) for check in checks] == [
        ("gguf.perplexity_change", 0.05, True),
        ("gguf.routing", 0.85, True),
    ]
    exact = _checks("onnx", 32.0, {})
    assert [(check.name, check.threshold) for check in exact] == [
        ("onnx.perplexity_change", 0.001),
        ("onnx.routing", 0.99),
    ]


def test_of_an_original_that_was_only_quantized_its_divergence_is_asked_too() -> None:
    checks = _checks("gguf", 4.5, {"top1": 0.5}, whole=True, kld=0.0601, top1=0.5)
    assert [(check.name, check.threshold, check.passed) for check in checks] == [
        ("gguf.perplexity_change", 0.05, True),
        ("gguf.routing", 0.85, True),
        ("gguf.kld", 0.06, False),
        ("gguf.top1", 0.5, True),
    ]


@pytest.mark.parametrize(
    ("bits", "name"),
    [
        (32.0, "32-bit"),
        (16.0, "16-bit"),
        (8.5, "8-bit"),
        (6.5625, "6-bit"),
        (6.0, "5-bit"),
        (5.5, "5-bit"),
        (4.85, "4-bit"),
        (4.25, "4-bit"),
        (3.44, "3-bit"),
        (2.63, "2-bit"),
        (1.6, "2-bit"),
    ],
)
def test_every_number_of_bits_has_its_band(bits: float, name: str) -> None:
    assert band_of(bits).name == name


def test_bands_stand_above_published_good_files_and_below_bad_ones() -> None:
    """Mean divergences of Llama-3-8B and Qwen3.6-35B-A3B files, the larger of both; docs/validation.md cites."""
    published = {"8-bit": 0.0059, "6-bit": 0.0055, "5-bit": 0.0108, "4-bit": 0.036, "3-bit": 0.18, "2-bit": 0.45}
    allowed = {band.name: band.fidelity.kld for band in BANDS}
    for name, divergence in published.items():
        assert divergence < allowed[name] < 4 * divergence


def test_more_bits_are_held_to_more() -> None:
    for better, worse in pairwise(BANDS):
        assert better.least_bits > worse.least_bits
        assert better.fidelity.perplexity_change < worse.fidelity.perplexity_change
        assert better.fidelity.routing_overlap >= worse.fidelity.routing_overlap
        assert better.fidelity.kld < worse.fidelity.kld
        assert better.fidelity.top1 > worse.fidelity.top1


def test_requirements_replace_the_defaults_and_add_checks() -> None:
    require = {"perplexity_change": 0.2, "routing": 0.5, "kld": 0.1, "top1": 0.9, "loops": 0.25}
    assert set(require) == set(REQUIREMENTS)
    found = {"kld": 0.11, "top1": 0.9, "routing": 0.49, "perplexity_change": 0.2, "loops": 0.3, "loops_allowed": 0.5}
    checks = _checks("gguf", 4.5, require, **found)
    assert checks == [
        Check("gguf.perplexity_change", 0.2, 0.2, True),
        Check("gguf.routing", 0.49, 0.5, False),
        Check("gguf.kld", 0.11, 0.1, False),
        Check("gguf.top1", 0.9, 0.9, True),
        Check("gguf.loops", 0.3, 0.25, False),
    ]


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_each_requirement_is_checked_by_its_name(name: str) -> None:
    worst = {"kld": 9.0, "top1": 0.0, "routing": 0.0, "perplexity_change": 9.0, "loops": 1.0}
    checks = _checks("onnx", 4.5, {name: 0.5}, **{name: worst[name]})
    assert [check.name for check in checks if not check.passed] == [f"onnx.{name}"]


@pytest.mark.parametrize(("rate", "passed"), [(0.0, True), (4 / 24, True), (5 / 24, False)])
def test_a_file_may_loop_as_often_as_chance_explains(rate: float, passed: bool) -> None:
    allowed = largest_share_by_chance(0, 24)
    (check,) = [check for check in _checks("gguf", 8.5, {}, loops=rate, loops_allowed=allowed) if "loops" in check.name]
    assert (check.value, check.passed) == (rate, passed)


def test_a_crashed_runtime_fails_every_check() -> None:
    nothing = dict.fromkeys(_PERFECT)
    checks = _checks("gguf", 8.5, {"kld": 1.0, "top1": 0.1}, **nothing)
    assert len(checks) == 4
    assert not any(check.passed for check in checks)


def test_nothing_is_asked_of_a_dense_model_s_routing() -> None:
    require = {"routing": 0.5, "kld": 1.0}
    checks = _checks("onnx", 8.5, require, routed=False, routing=None)
    assert [(check.name, check.passed) for check in checks] == [("onnx.perplexity_change", True), ("onnx.kld", True)]
