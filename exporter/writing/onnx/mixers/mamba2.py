"""Mamba-2 by the operator LinearAttention; its cache is a state and the convolution's last inputs.

In the operator's words a head's values are the convolved ones times the head's step, its key and its query are those of
its group, and the logarithm of the decay is the step times a rate. Padding is kept out of the states: it enters the
convolution as zeros, and its steps are 0, so that it fades nothing and adds nothing.
"""

from __future__ import annotations

import numpy as np

from compressors.model.description.mixers import Mamba2
from compressors.model.description.roles import Role
from compressors.model.files.onnx_names import STATES, cache_output
from exporter.writing.onnx.builder import MICROSOFT, GraphBuilder
from exporter.writing.onnx.mixers.convolution import convolved
from exporter.writing.onnx.mixers.states import add_past_states, add_state_outputs, repeated_heads, side_by_side
from exporter.writing.onnx.padding import AttentionMask, RecurrentTokens
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["Mamba2Nodes"]

_NAME = "mamba"


class Mamba2Nodes:
    """Implements :class:`~exporter.writing.onnx.mixers.registry.MixerNodes`."""

    def __init__(self, mixer: Mamba2) -> None:
        self._mixer = mixer

    def add(self, layer: LayerNodes, normed: str, mask: AttentionMask) -> str:
        """Adds the projection, the convolution, the recurrence, and the gate and the norm of its output."""
        tokens, graph, mixer, prefix = mask.recurrent, layer.graph, self._mixer, f"{layer.prefix}{_NAME}."
        assert tokens is not None
        past_inputs, past_state = add_past_states(layer, mixer)
        kept = graph.node("Mul", [normed, tokens.kept], f"{prefix}input")
        projected = layer.linear(Role.MIXER_INPUT, kept, f"{prefix}projected")
        gate, inputs, steps = layer.split(projected, [mixer.width, mixer.channels, mixer.n_heads], "parts")
        all_channels = convolved(layer, inputs, past_inputs, tokens, name=_NAME, kernel=mixer.kernel, activation="silu")
        of_keys = mixer.n_groups * mixer.key_dim
        values, key, query = layer.split(all_channels, [mixer.width, of_keys, of_keys], "parts")
        heads, step = self._by_head(layer, values), self._steps(layer, steps, tokens)
        recalled = self._recalled(layer, (query, key, heads, past_state), step)
        output = graph.node("Add", [recalled, self._skipped(layer, heads)], f"{prefix}output")
        weight = graph.node("Sigmoid", [gate], f"{prefix}gate.weight")
        activated = graph.node("Mul", [gate, weight], f"{prefix}gate.silu")
        gated = graph.node("Mul", [output, activated], f"{prefix}output.gated")
        return layer.linear(Role.MIXER_OUTPUT, self._normed(layer, gated), f"{layer.prefix}{_NAME}")

    def add_cache_outputs(self, graph: GraphBuilder, layer: int) -> None:
        """Declares the convolution's last inputs and the state."""
        add_state_outputs(graph, layer, self._mixer)

    def _steps(self, layer: LayerNodes, steps: str, tokens: RecurrentTokens) -> str:
        """The step of each head: [batch, sequence, heads]; 0 in the place of padding."""
        graph, prefix, bias = layer.graph, f"{layer.prefix}{_NAME}.step", layer.vector(Role.DECAY_BIAS)
        assert bias is not None
        softplus = graph.node("Softplus", [graph.node("Add", [steps, bias], f"{prefix}.logits")], f"{prefix}.all")
        return graph.node("Mul", [softplus, tokens.kept], prefix)

    def _recalled(self, layer: LayerNodes, inputs: tuple[str, str, str, str], step: str) -> str:
        """Returns what the queries find in the states, all heads side by side, and the new states."""
        graph, mixer, prefix = layer.graph, self._mixer, f"{layer.prefix}{_NAME}."
        query, key, heads, past_state = inputs
        logarithm = layer.vector(Role.DECAY_LOGARITHM)
        assert logarithm is not None
        rate = graph.node("Neg", [graph.node("Exp", [logarithm], f"{prefix}rate")], f"{prefix}rate.negative")
        decay = graph.node("Mul", [step, rate], f"{prefix}decay")
        column = graph.node("Unsqueeze", [step, graph.constant("axis.last", [-1])], f"{prefix}step.column")
        value = side_by_side(layer, graph.node("Mul", [heads, column], f"{prefix}value"))
        return graph.node(
            "LinearAttention",
            [query, self._keys(layer, key), value, past_state, decay],
            [f"{prefix}recalled", cache_output(layer.index, STATES[1])],
            domain=MICROSOFT,
            q_num_heads=mixer.n_groups,
            kv_num_heads=mixer.n_heads,
            scale=1.0,
            update_rule="gated",
        )

    def _keys(self, layer: LayerNodes, key: str) -> str:
        """A key for each head, side by side."""
        mixer = self._mixer
        if mixer.n_heads == mixer.n_groups:
            return key
        by_group = layer.graph.constant("shape.by_group", [0, 0, mixer.n_groups, -1])
        groups = layer.graph.node("Reshape", [key, by_group], f"{key}.groups")
        repeated = repeated_heads(layer, groups, f"{_NAME}.group_of_head", mixer.n_groups, mixer.n_heads)
        return side_by_side(layer, repeated)

    def _by_head(self, layer: LayerNodes, values: str) -> str:
        by_head = layer.graph.constant("shape.by_head", [0, 0, self._mixer.n_heads, -1])
        return layer.graph.node("Reshape", [values, by_head], f"{values}.heads")

    def _skipped(self, layer: LayerNodes, heads: str) -> str:
        """The part of the values that goes past the states."""
        graph, prefix, skip = layer.graph, f"{layer.prefix}{_NAME}.", layer.vector(Role.MIXER_SKIP)
        assert skip is not None
        column = graph.node("Unsqueeze", [skip, graph.constant("axis.last", [-1])], f"{prefix}skip")
        return side_by_side(layer, graph.node("Mul", [heads, column], f"{prefix}skipped"))

    def _normed(self, layer: LayerNodes, values: str) -> str:
        """Normalises the values of each group, and multiplies them by scales of their own."""
        graph, mixer, name = layer.graph, self._mixer, f"{layer.prefix}{_NAME}.output.normed"
        if mixer.n_groups == 1:
            return layer.rms_norm(Role.MIXER_NORM, values, name)
        scales = layer.vector(Role.MIXER_NORM)
        assert scales is not None
        by_group = graph.constant("shape.by_group", [0, 0, mixer.n_groups, -1])
        groups = graph.node("Reshape", [values, by_group], f"{name}.groups")
        units = graph.constant(f"{_NAME}.unit_scales", np.ones(mixer.width // mixer.n_groups), np.float32)
        return graph.node("Mul", [side_by_side(layer, layer.unit_rms(groups, units, f"{name}.units")), scales], name)
