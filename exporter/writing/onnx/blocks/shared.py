"""The shared expert beside routed ones, which every token goes through."""

from __future__ import annotations

from compressors.model.description.feed_forward import Shared
from compressors.model.description.glu import Glu
from compressors.model.description.roles import Role
from exporter.writing.onnx.blocks.dense import add_neurons
from exporter.writing.onnx.glu import add_glu
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["add_shared"]

_PROJECTIONS = (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN)


def add_shared(layer: LayerNodes, shared: Shared, glu: Glu, normed: str, residual: str) -> str:
    """Adds the shared expert's nodes; returns its output, multiplied by its gate if it has one.

    Args:
        layer: takes the nodes.
        shared: the expert.
        glu: the function between its products.
        normed: the routed experts' input, which is its own too, unless it has norms.
        residual: the residual stream.
    """
    name = f"{layer.prefix}shared"
    if shared.has_norms:
        own = layer.rms_norm(Role.SHARED_NORM, residual, f"{name}.normed_input")
        output = add_neurons(layer, _PROJECTIONS, glu, own, f"{name}.plain")
        return layer.rms_norm(Role.SHARED_OUTPUT_NORM, output, name)
    if not shared.is_gated:
        return _add_neurons(layer, shared, glu, normed, name)
    output = _add_neurons(layer, shared, glu, normed, f"{name}.ungated")
    logits = layer.linear(Role.SHARED_ROUTER, normed, f"{name}.router")
    gate = layer.graph.node("Sigmoid", [logits], f"{name}.weight")
    return layer.graph.node("Mul", [output, gate], name)


def _add_neurons(layer: LayerNodes, shared: Shared, glu: Glu, normed: str, output: str) -> str:
    """Adds the expert; the rows of its gate and its up may be one matrix."""
    if Role.SHARED_GATE_UP not in layer.spec.roles:
        return add_neurons(layer, _PROJECTIONS, glu, normed, output)
    both = layer.linear(Role.SHARED_GATE_UP, normed, f"{output}.gate_up")
    gate, up = layer.split(both, [shared.width] * 2, "parts")
    hidden = add_glu(layer.graph, glu, gate, up, output)
    return layer.linear(Role.SHARED_DOWN, hidden, output)
