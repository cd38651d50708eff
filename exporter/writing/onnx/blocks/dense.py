"""A feed-forward that every token goes through: in a dense layer, and as the shared expert of a routed one."""

from __future__ import annotations

from compressors.model.description.feed_forward import Dense
from compressors.model.description.glu import Glu
from compressors.model.description.roles import Role
from exporter.writing.onnx.glu import add_glu
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["add_dense", "add_neurons"]

_PROJECTIONS = (Role.DENSE_GATE, Role.DENSE_UP, Role.DENSE_DOWN)
_OF_AN_EXPERT = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


def add_dense(layer: LayerNodes, dense: Dense, normed: str, _residual: str) -> str:
    """Adds a dense layer's feed-forward, of which all reads ``normed``; in a dense student it was the only expert."""
    projections = _PROJECTIONS if Role.DENSE_UP in layer.spec.roles else _OF_AN_EXPERT
    return add_neurons(layer, projections, dense.glu, normed, f"{layer.prefix}feed_forward")


def add_neurons(layer: LayerNodes, projections: tuple[Role, Role, Role], glu: Glu, normed: str, output: str) -> str:
    """Adds down(activation(gate(x)) * up(x)).

    Args:
        layer: takes the nodes.
        projections: the roles of gate, up and down.
        glu: the function between them; without a gate in it, gate is not used.
        normed: the name of x.
        output: the result's name.
    """
    gate_role, up_role, down_role = projections
    gate = layer.linear(gate_role, normed, f"{output}.gate") if glu.is_gated else None
    up = layer.linear(up_role, normed, f"{output}.up")
    hidden = add_glu(layer.graph, glu, gate, up, output)
    return layer.linear(down_role, hidden, output)
