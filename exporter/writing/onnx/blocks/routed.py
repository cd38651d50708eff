"""Routed experts, and the shared expert beside them."""

from __future__ import annotations

import numpy as np

from compressors.model.description.feed_forward import Routed
from compressors.model.description.roles import Role
from compressors.model.files.onnx_names import EXPERTS_INPUT, ROUTER_FACTOR
from exporter.capabilities.onnx import needs_nodes
from exporter.writing.onnx.blocks.chosen_experts import add_chosen_experts
from exporter.writing.onnx.blocks.operators import add_experts
from exporter.writing.onnx.blocks.shared import add_shared
from exporter.writing.onnx.blocks.shared_bases import add_experts_on_bases
from exporter.writing.onnx.routing import add_routing
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["add_routed"]


def add_routed(layer: LayerNodes, routed: Routed, normed: str, residual: str) -> str:
    """Adds router, experts and, if there is one, the shared expert."""
    output = f"{layer.prefix}moe"
    states = _router_states(layer, residual) if routed.router_has_norm else normed
    logits = layer.linear(Role.ROUTER, states, f"{layer.prefix}router", Role.ROUTER_BIAS)
    experts = output if routed.shared is None else f"{output}.experts"
    found = _add_chosen(layer, routed, logits, normed, experts)
    if routed.shared is None:
        return found
    return layer.graph.node("Add", [found, add_shared(layer, routed.shared, routed.glu, normed, residual)], output)


def _router_states(layer: LayerNodes, residual: str) -> str:
    """The router's own norm of the residual stream, divided by the root of its size."""
    normed = layer.rms_norm(Role.ROUTER_NORM, residual, f"{layer.prefix}router.normed")
    factor = layer.graph.constant(ROUTER_FACTOR, layer.spec.hidden_size**-0.5, np.float32)
    return layer.graph.node("Mul", [normed, factor], f"{layer.prefix}router.states")


def _add_chosen(layer: LayerNodes, routed: Routed, logits: str, normed: str, output: str) -> str:
    """Adds the routed experts, by an operator, by nodes or by both, and the matrices around them or the norm behind."""
    add = add_chosen_experts if needs_nodes(routed) else _add_by_operator
    if layer.spec.bases is not None:
        add = add_experts_on_bases
    if routed.latent_size is not None:
        inputs = layer.linear(Role.EXPERTS_INPUT, normed, f"{layer.prefix}{EXPERTS_INPUT}")
        return layer.linear(Role.EXPERTS_OUTPUT, add(layer, routed, logits, inputs, f"{output}.latent"), output)
    plain = output if Role.EXPERTS_OUTPUT_NORM not in layer.spec.roles else f"{output}.plain"
    found = add(layer, routed, logits, normed, plain)
    return found if plain == output else layer.rms_norm(Role.EXPERTS_OUTPUT_NORM, found, output)


def _add_by_operator(layer: LayerNodes, routed: Routed, logits: str, normed: str, output: str) -> str:
    bias = layer.vector(Role.SELECTION_BIAS) if routed.routing.has_selection_bias else None
    routing = add_routing(layer.graph, routed, logits, bias, layer.prefix)
    of_operator = output if routing.factor is None else f"{output}.unscaled"
    found = add_experts(layer, routed, routing, normed, of_operator)
    return found if routing.factor is None else layer.graph.node("Mul", [found, routing.factor], output)
