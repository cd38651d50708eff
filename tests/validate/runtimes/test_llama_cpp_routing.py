"""Nodes collected from a graph become routing, whichever of llama.cpp's nodes a model's layers have."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from validate.runtimes.llama_cpp_routing import RoutingCollector


def _collected(parts: dict[tuple[str, int], npt.NDArray[np.float32]], n_layers: int) -> RoutingCollector:
    collector = RoutingCollector()
    collector.start()
    assert collector._parts is not None
    for key, values in parts.items():
        halves = np.array_split(values, 2)  # a chunk is evaluated in two
        collector._parts[key].extend(halves)
    with collector.without_logits(n_layers - 1):
        pass
    return collector


def test_layers_without_experts_have_none() -> None:
    """A dense layer before and behind one with experts, and fewer experts of a token in the next."""
    experts = {1: np.array([[3, 1], [0, 2], [1, 0]]), 2: np.array([[4], [4], [0]])}
    weights = {1: np.array([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]], np.float32), 2: np.ones((3, 1), np.float32)}
    parts = {("ffn_moe_topk", layer): found for layer, found in experts.items()}
    parts |= {("ffn_moe_weights", layer): found for layer, found in weights.items()}
    parts |= {("ffn_moe_logits", layer): np.full(3, layer, np.float32) for layer in experts}
    routing = _collected(parts, n_layers=4).finish(3)
    assert routing.experts_LTK.shape == (4, 3, 2) and routing.margins_LT is not None
    assert (routing.experts_LTK[[0, 3]] == -1).all() and (routing.weights_LTK[[0, 3]] == 0).all()
    np.testing.assert_array_equal(routing.experts_LTK[1], experts[1])
    np.testing.assert_array_equal(routing.experts_LTK[2], [[4, -1], [4, -1], [0, -1]])
    np.testing.assert_array_equal(routing.weights_LTK[2, :, 0], weights[2][:, 0])
    np.testing.assert_array_equal(routing.margins_LT[:, 0], [np.inf, 1, 2, np.inf])


def test_weights_are_those_that_are_applied() -> None:
    """The last node of those that a graph has: normalised, and then scaled."""
    raw = np.array([[0.2, 0.1]], np.float32)
    steps = {"ffn_moe_weights": raw, "ffn_moe_weights_norm": raw / 0.3, "ffn_moe_weights_scaled": raw / 0.3 * 2.5}
    for last in range(1, 4):
        kept = dict(list(steps.items())[:last])
        parts = {(name, 0): values for name, values in kept.items()}
        parts |= {("ffn_moe_topk", 0): np.array([[5, 2]]), ("ffn_moe_logits", 0): np.zeros(1, np.float32)}
        routing = _collected(parts, n_layers=1).finish(1)
        np.testing.assert_array_equal(routing.weights_LTK[0], list(kept.values())[-1])
