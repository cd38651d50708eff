"""Pass or fail: thresholds are inclusive, requirements replace defaults, what was not measured fails."""

from __future__ import annotations

import math
from typing import Any

import pytest

from exporter.gguf.layout import PRESETS
from exporter.job import QUANT_TYPES
from validate.verdict import REQUIREMENTS, Check, fidelity_for, required_checks

_PERFECT: dict[str, Any] = {"is_routed": True, "kld": 0.0, "top1": 1.0, "routing": 1.0, "perplexity_change": 0.0}


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
    checks = required_checks("gguf", "Q4_0", {}, **_PERFECT)
    assert [(check.name, check.threshold, check.passed) for check in checks] == [
        ("gguf.perplexity_change", 0.05, True),
        ("gguf.routing", 0.85, True),
    ]
    exact = required_checks("onnx", "F32", {}, **_PERFECT)
    assert [(check.name, check.threshold) for check in exact] == [
        ("onnx.perplexity_change", 0.001),
        ("onnx.routing", 0.99),
    ]


def test_more_bits_are_held_to_more() -> None:
    by_bits = ["F32", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K"]
    changes = [fidelity_for(name).perplexity_change for name in by_bits]
    overlaps = [fidelity_for(name).routing_overlap for name in by_bits]
    assert changes == sorted(changes)
    assert overlaps == sorted(overlaps, reverse=True)


@pytest.mark.parametrize("weight_type", sorted({*PRESETS, *QUANT_TYPES}))
def test_every_type_that_can_be_written_has_thresholds(weight_type: str) -> None:
    fidelity = fidelity_for(weight_type)
    assert 0 < fidelity.perplexity_change < 0.1
    assert 0.8 < fidelity.routing_overlap < 1


def test_requirements_replace_the_defaults_and_add_checks() -> None:
    require = {"perplexity_change": 0.2, "routing": 0.5, "kld": 0.1, "top1": 0.9}
    assert set(require) == set(REQUIREMENTS)
    found = {"kld": 0.11, "top1": 0.9, "routing": 0.49, "perplexity_change": 0.2}
    checks = required_checks("gguf", "Q4_0", require, **_PERFECT | found)
    assert checks == [
        Check("gguf.perplexity_change", 0.2, 0.2, True),
        Check("gguf.routing", 0.49, 0.5, False),
        Check("gguf.kld", 0.11, 0.1, False),
        Check("gguf.top1", 0.9, 0.9, True),
    ]


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_each_requirement_is_checked_by_its_name(name: str) -> None:
    worst = {"kld": 9.0, "top1": 0.0, "routing": 0.0, "perplexity_change": 9.0}
    checks = required_checks("onnx", "Q4_0", {name: 0.5}, **_PERFECT | {name: worst[name]})
    assert [check.name for check in checks if not check.passed] == [f"onnx.{name}"]


def test_a_crashed_runtime_fails_every_check() -> None:
    checks = required_checks(
        "gguf",
        "Q8_0",
        {"kld": 1.0, "top1": 0.1},
        is_routed=True,
        kld=None,
        top1=None,
        routing=None,
        perplexity_change=None,
    )
    assert len(checks) == 4
    assert not any(check.passed for check in checks)


def test_nothing_is_asked_of_a_dense_model_s_routing() -> None:
    require = {"routing": 0.5, "kld": 1.0}
    checks = required_checks("onnx", "Q8_0", require, **_PERFECT | {"is_routed": False, "routing": None})
    assert [(check.name, check.passed) for check in checks] == [("onnx.perplexity_change", True), ("onnx.kld", True)]
