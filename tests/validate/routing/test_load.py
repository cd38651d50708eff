"""Loads worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from compressors.model.predictions.routing_record import RoutingRecord
from validate.routing.load import expert_load, load_figures

_ROUTING = RoutingRecord(
    np.array([[[0, 1], [0, 2], [0, 1], [1, 0]], [[-1, -1]] * 4, [[2, -1], [2, -1], [2, -1], [0, -1]]], np.int32),
    np.array(
        [[[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.5, 0.5]], [[0, 0]] * 4, [[1, 0], [1, 0], [1, 0], [1, 0]]], np.float32
    ),
)
"""Four tokens: top-2 of four experts; a layer without experts; top-1 of three experts."""


def test_shares_of_tokens_and_gate_weight() -> None:
    first, second, third = expert_load(_ROUTING, (4, 0, 3))
    assert second is None and first is not None and third is not None
    assert first.tokens_E.tolist() == [1.0, 0.75, 0.25, 0.0]
    np.testing.assert_allclose(first.gate_weight_E, np.array([2.6, 1.1, 0.3, 0.0]) / 4, atol=1e-6)
    assert third.tokens_E.tolist() == [0.25, 0.0, 0.75]
    assert first.tokens_E.sum() == 2 and third.gate_weight_E.sum() == 1


def test_balance() -> None:
    layer = expert_load(_ROUTING, (4, 0, 3))[0]
    assert layer is not None
    assert layer.variation == pytest.approx(np.std([1, 0.75, 0.25, 0]) / 0.5)
    assert layer.dead == [3]
    assert layer.largest == 2.0
    even = RoutingRecord(np.array([[[0], [1], [2], [3]]], np.int32), np.ones((1, 4, 1), np.float32))
    (balanced,) = expert_load(even, (4,))
    assert balanced is not None and (balanced.variation, balanced.dead, balanced.largest) == (0.0, [], 1.0)


def test_dead_begins_below_a_tenth_of_an_even_share() -> None:
    """Two experts, top-1: of 40 tokens an even share is 20; two tokens are a tenth of that, one is less."""
    for n_second, expected in ((2, []), (1, [1])):
        chosen = np.array([1] * n_second + [0] * (40 - n_second), np.int32).reshape(1, 40, 1)
        (layer,) = expert_load(RoutingRecord(chosen, np.ones((1, 40, 1), np.float32)), (2,))
        assert layer is not None and layer.dead == expected


def test_figures_are_plain_and_short() -> None:
    chosen = np.array([[[0], [0], [1]]], np.int32)
    figures = load_figures(expert_load(RoutingRecord(chosen, np.ones((1, 3, 1), np.float32)), (3,)))
    assert json.loads(json.dumps(figures)) == figures
    assert figures["tokens"] == [[0.6667, 0.3333, 0.0]]
    assert figures["gate_weight"] == figures["tokens"]
    assert (figures["n_dead"], figures["dead"], figures["largest"]) == (1, [[2]], 2.0)
    without = load_figures(expert_load(_ROUTING, (4, 0, 3)))
    assert without["tokens"][1] is None and without["dead"][1] is None and without["n_dead"] == 2
    assert without["mean_variation"] == pytest.approx(np.mean([without["variation"][0], without["variation"][2]]), 1e-3)
