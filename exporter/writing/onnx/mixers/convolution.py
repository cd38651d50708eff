"""A convolution of each channel over the last tokens; the inputs that the next token needs are a cache of the graph.

CausalConvWithState is slower than Conv for a prompt, where products with matrices take most of the time, and four times
faster in a step. What it keeps itself is not used: with padding behind a row's tokens, the inputs to keep are not the
last ones. They are read before new ones are written, because onnxruntime-genai may give one buffer as input and output.
"""

from __future__ import annotations

import numpy as np

from compressors.model.description.roles import Role
from compressors.model.files.onnx_names import STATES, cache_output
from exporter.writing.onnx.builder import MICROSOFT
from exporter.writing.onnx.padding import RecurrentTokens
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["convolved"]

_CHANNELS_LAST = (0, 2, 1)


def convolved(
    layer: LayerNodes, inputs: str, past: str, tokens: RecurrentTokens, *, name: str, kernel: int, activation: str
) -> str:
    """Adds the convolution, and the inputs that it keeps for the next token.

    Args:
        layer: takes the nodes.
        inputs: the name of the inputs, [batch, sequence, channels], where padding is zeros.
        past: the name of the inputs kept so far, [batch, channels, kernel - 1].
        tokens: the values that keep padding out.
        name: follows the layer in the names of the nodes' values.
        kernel: tokens that the convolution covers, the newest included; two or more.
        activation: the operator's name for the function of the outputs; ``none``: there is none.

    Returns:
        The name of the outputs.
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
        activation=activation,
        channels_last=1,
    )
    seen = graph.node("Concat", [before, inputs], f"{prefix}inputs.seen", axis=1)
    numbers = graph.constant(f"convolution.last_{kernel - 1}", np.arange(kernel - 1)[:, None])
    places = graph.node("Add", [tokens.end, numbers], f"{prefix}inputs.places")
    last = graph.node("GatherND", [seen, places], f"{prefix}inputs.last", batch_dims=1)
    graph.node("Transpose", [last], cache_output(layer.index, STATES[0]), perm=_CHANNELS_LAST)
    return outputs[0]
