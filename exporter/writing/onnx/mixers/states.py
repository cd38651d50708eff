"""The caches of recurrent mixers: the last inputs of a convolution, and a state, as inputs and outputs of the graph.

Both are read before new ones are written, because onnxruntime-genai gives one buffer as input and output. The inputs
that are kept are the last ones of a row's tokens, whatever padding follows.
"""

from __future__ import annotations

import numpy as np
import onnx

from compressors.model.description.onnx_cache import WithStates, state_shapes
from compressors.model.description.roles import Role
from compressors.model.files.onnx_names import STATES, cache_input, cache_output
from exporter.writing.onnx.builder import MICROSOFT, GraphBuilder
from exporter.writing.onnx.padding import RecurrentTokens
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["add_past_states", "add_state_outputs", "convolved", "repeated_heads", "side_by_side"]

_FLOAT = onnx.TensorProto.FLOAT
_CHANNELS_LAST = (0, 2, 1)


def add_past_states(layer: LayerNodes, mixer: WithStates) -> list[str]:
    """Adds the inputs of both states."""
    return [
        layer.graph.add_input(cache_input(layer.index, kind), _FLOAT, ["batch", *shape])
        for kind, shape in zip(STATES, state_shapes(mixer), strict=True)
    ]


def add_state_outputs(graph: GraphBuilder, layer: int, mixer: WithStates) -> None:
    """Declares the convolution's last inputs and the state."""
    for kind, shape in zip(STATES, state_shapes(mixer), strict=True):
        graph.add_output(cache_output(layer, kind), _FLOAT, ["batch", *shape])


def convolved(layer: LayerNodes, name: str, inputs: str, past: str, tokens: RecurrentTokens, kernel: int) -> str:
    """Adds the convolution with its SiLU, and the inputs that it keeps for the next token.

    Args:
        layer: takes the nodes.
        name: the beginning of the names of values, behind the layer's.
        inputs: its inputs, zeros in the place of padding.
        past: those that were kept.
        tokens: the values about padding.
        kernel: the tokens that it covers.
    """
    graph, prefix = layer.graph, f"{layer.prefix}{name}."
    before = graph.node("Transpose", [past], f"{prefix}inputs.past", perm=_CHANNELS_LAST)
    outputs = [f"{prefix}convolved", f"{prefix}convolved.unused"]
    weight, bias = layer.vector(Role.CONVOLUTION), layer.vector(Role.CONVOLUTION_BIAS)
    assert weight is not None
    graph.node(
        "CausalConvWithState",
        [inputs, weight, bias or "", before],
        outputs,
        domain=MICROSOFT,
        activation="silu",
        channels_last=1,
    )
    seen = graph.node("Concat", [before, inputs], f"{prefix}inputs.seen", axis=1)
    numbers = graph.constant(f"convolution.last_{kernel - 1}", np.arange(kernel - 1)[:, None])
    places = graph.node("Add", [tokens.end, numbers], f"{prefix}inputs.places")
    last = graph.node("GatherND", [seen, places], f"{prefix}inputs.last", batch_dims=1)
    graph.node("Transpose", [last], cache_output(layer.index, STATES[0]), perm=_CHANNELS_LAST)
    return outputs[0]


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
