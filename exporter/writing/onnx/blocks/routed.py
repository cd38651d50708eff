"""Routed experts by ONNX Runtime's operators MoE and QMoE, and the shared expert beside them."""

from __future__ import annotations

from typing import Any

import numpy as np

from compressors.model.description.feed_forward import Routed
from compressors.model.description.roles import Role
from compressors.model.files.onnx_names import EXPERTS_INPUT, ROUTER_FACTOR
from exporter.capabilities.onnx import needs_nodes
from exporter.writing.onnx.blocks.chosen_experts import add_chosen_experts
from exporter.writing.onnx.blocks.shared import add_shared
from exporter.writing.onnx.builder import MICROSOFT
from exporter.writing.onnx.glu import operator_attributes
from exporter.writing.onnx.layout import WeightPlan
from exporter.writing.onnx.routing import OperatorRouting, add_routing
from exporter.writing.onnx.weights import LayerNodes, accuracy_level

__all__ = ["add_routed"]

_ROUTER_WEIGHTS_INPUT = 14  # an input of QMoE


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
    """Adds the routed experts, by an operator or by nodes, and the matrices around them or the norm behind them."""
    add = add_chosen_experts if needs_nodes(routed) else _add_by_operator
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
    found = _add_experts(layer, routed, routing, normed, of_operator)
    return found if routing.factor is None else layer.graph.node("Mul", [found, routing.factor], output)


def _add_experts(layer: LayerNodes, routed: Routed, routing: OperatorRouting, normed: str, output: str) -> str:
    gate_up, down = layer.weight(routed.input_roles[0]), layer.weight(Role.EXPERT_DOWN)
    attributes = {"k": routed.top_k, "normalize_routing_weights": int(routing.normalizes)}
    attributes |= operator_attributes(routed.glu)
    if gate_up.encoding.blocks is None:
        return _add_float32(layer, (gate_up, down), routing, normed, output, attributes)
    return _add_quantized(layer, (gate_up, down), routing, normed, output, attributes)


def _add_float32(
    layer: LayerNodes,
    matrices: tuple[WeightPlan, WeightPlan],
    routing: OperatorRouting,
    normed: str,
    output: str,
    attributes: dict[str, Any],
) -> str:
    graph, (gate_up, down) = layer.graph, matrices
    of_gate_up, of_down = _biases(layer)
    inputs = [normed, routing.logits, graph.external(gate_up.codes), of_gate_up, graph.external(down.codes), of_down]
    if routing.normalizes:
        return graph.node("MoE", inputs, output, domain=MICROSOFT, **attributes)
    # ONNX Runtime 1.31's CPU kernel may write its output over its input. It copies the input first only when it
    # normalises, and otherwise clears the values that it is about to read (moe_cpu.cc), so the block would add nothing.
    # A later node that takes the input too keeps it; this one always selects the experts' output.
    experts = graph.node("MoE", inputs, f"{output}.routed", domain=MICROSOFT, **attributes)
    return graph.node("Where", [graph.constant("true", True, np.bool_), experts, normed], output)


def _add_quantized(
    layer: LayerNodes,
    matrices: tuple[WeightPlan, WeightPlan],
    routing: OperatorRouting,
    normed: str,
    output: str,
    attributes: dict[str, Any],
) -> str:
    graph, (gate_up, down), blocks = layer.graph, matrices, matrices[0].encoding.blocks
    assert blocks is not None and blocks == down.encoding.blocks, "the operator has one width and one block size"
    gate_up_codes, down_codes = graph.external(gate_up.codes), graph.external(down.codes)
    gate_up_scales, down_scales = layer.weights.scales(gate_up), layer.weights.scales(down)
    of_gate_up, of_down = _biases(layer)
    inputs = [normed, routing.logits, gate_up_codes, gate_up_scales, of_gate_up, down_codes, down_scales, of_down]
    if not routing.normalizes:
        # ONNX Runtime 1.31's CPU kernel normalises the chosen gates whatever the attribute says, unless it is given
        # the gates of all experts (moe_quantization_cpu.cc).
        gates = graph.node("Softmax", [routing.logits], f"{output}.gates", axis=-1)
        inputs += [""] * (_ROUTER_WEIGHTS_INPUT - len(inputs)) + [gates]
    return graph.node(
        "QMoE",
        inputs,
        output,
        domain=MICROSOFT,
        expert_weight_bits=blocks.bits,
        block_size=blocks.block_size,
        accuracy_level=accuracy_level(gate_up),
        weights_prepacked=0,  # the codes are plain, not in the order of one GPU's kernels
        **attributes,
    )


def _biases(layer: LayerNodes) -> tuple[str, str]:
    """The biases of gate and up, whose values alternate as the rows do, and of down; an empty text: there are none."""
    return layer.vector(Role.EXPERT_GATE_UP_BIAS) or "", layer.vector(Role.EXPERT_DOWN_BIAS) or ""
