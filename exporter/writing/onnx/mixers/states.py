"""The caches of recurrent mixers: the last inputs of a convolution, and a state, as inputs and outputs of the graph.

They are read before new ones are written, because onnxruntime-genai gives one buffer as input and output.
"""

from __future__ import annotations

import numpy as np
import onnx

from compressors.model.description.onnx_cache import WithStates, state_shapes
from compressors.model.files.onnx_names import STATES, cache_input, cache_output
from exporter.writing.onnx.builder import GraphBuilder
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["add_past_states", "add_state_outputs", "repeated_heads", "side_by_side"]

_FLOAT = onnx.TensorProto.FLOAT


def add_past_states(layer: LayerNodes, mixer: WithStates) -> list[str]:
    """Adds the inputs of its states."""
    return [
        layer.graph.add_input(cache_input(layer.index, kind), _FLOAT, ["batch", *shape])
        for kind, shape in zip(STATES, state_shapes(mixer), strict=False)
    ]


def add_state_outputs(graph: GraphBuilder, layer: int, mixer: WithStates) -> None:
    """Declares the convolution's last inputs, and the state if it has one."""
    for kind, shape in zip(STATES, state_shapes(mixer), strict=False):
        graph.add_output(cache_output(layer, kind), _FLOAT, ["batch", *shape])


def repeated_heads(layer: LayerNodes, heads: str, constant: str, n_groups: int, n_heads: int) -> str:
    """Repeats each of ``n_groups`` heads for the heads that share it: [batch, sequence, heads, values of one].

    Args:
        layer: takes the nodes.
        heads: the heads of groups.
        constant: the name of the constant that says whose group each head is of.
        n_groups: their number.
        n_heads: the number of heads that share them.
    """
    if n_heads == n_groups:
        return heads
    owners = np.repeat(np.arange(n_groups), n_heads // n_groups)
    indices = layer.graph.constant(constant, owners)
    return layer.graph.node("Gather", [heads, indices], f"{heads}.repeated", axis=2)


def side_by_side(layer: LayerNodes, heads: str) -> str:
    """Joins the values of all heads."""
    together = layer.graph.constant("shape.side_by_side", [0, 0, -1])
    return layer.graph.node("Reshape", [heads, together], f"{heads}.side_by_side")
