"""A gated delta rule by the operator LinearAttention; its cache is a state and the convolution's last inputs.

The operator takes one token after the other, in compiled code: 300 tokens of a layer of Qwen3-Next take a twentieth of
a second on one core, and eight times as long by a Scan.

Padding is kept out of the states: it enters the convolution as zeros, it fades nothing and corrects nothing.
"""

from __future__ import annotations

import numpy as np

from compressors.model.description.mixers import GatedDelta
from compressors.model.description.roles import Role
from compressors.model.files.onnx_names import JOINED, STATES, cache_output
from exporter.writing.onnx.builder import MICROSOFT, GraphBuilder
from exporter.writing.onnx.mixers.convolution import convolved
from exporter.writing.onnx.mixers.states import add_past_states, add_state_outputs, repeated_heads, side_by_side
from exporter.writing.onnx.padding import AttentionMask, RecurrentTokens
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["GatedDeltaNodes"]

_NAME = "delta"


class GatedDeltaNodes:
    """Implements :class:`~exporter.writing.onnx.mixers.registry.MixerNodes`."""

    def __init__(self, mixer: GatedDelta) -> None:
        self._mixer = mixer

    def add(self, layer: LayerNodes, normed: str, mask: AttentionMask) -> str:
        """Adds projections, the convolution, the rule, and the norm of its output with its gate."""
        tokens, graph, prefix = mask.recurrent, layer.graph, layer.prefix
        assert tokens is not None
        past_inputs, past_state = add_past_states(layer, self._mixer)
        kept = graph.node("Mul", [normed, tokens.kept], f"{prefix}delta.input")
        inputs, gate = self._inputs(layer, kept)
        channels = convolved(
            layer, inputs, past_inputs, tokens, name=_NAME, kernel=self._mixer.kernel, activation="silu"
        )
        decay, strength = self._decay_and_strength(layer, kept, tokens)
        recalled = graph.node(
            "LinearAttention",
            [*self._heads(layer, channels), past_state, decay, strength],
            [f"{prefix}delta.recalled", cache_output(layer.index, STATES[1])],
            domain=MICROSOFT,
            q_num_heads=self._mixer.n_key_heads,
            kv_num_heads=self._mixer.n_value_heads,
            scale=self._mixer.scale,
            update_rule="gated_delta",
        )
        output = layer.gated_rms_norm(Role.MIXER_NORM, recalled, gate, f"{prefix}delta.normed")
        return layer.linear(Role.MIXER_OUTPUT, output, f"{prefix}delta")

    def add_cache_outputs(self, graph: GraphBuilder, layer: int) -> None:
        """Declares the convolution's last inputs and the state."""
        add_state_outputs(graph, layer, self._mixer)

    def _inputs(self, layer: LayerNodes, values: str) -> tuple[str, str]:
        """The convolution's inputs, which are queries, keys and values of all heads, and the gates of the output."""
        mixer, prefix = self._mixer, layer.prefix
        inputs = layer.linear(Role.MIXER_INPUT, values, f"{prefix}delta.projected")
        if Role.MIXER_GATE in layer.spec.roles:
            return inputs, layer.linear(Role.MIXER_GATE, values, f"{prefix}delta.gate")
        of_values = mixer.width // mixer.n_key_heads
        lengths = [mixer.key_dim, mixer.key_dim, of_values, of_values]
        *parts, gate = self._ungrouped(layer, inputs, lengths)
        return layer.joined(parts, f"{prefix}delta.projected{JOINED}"), gate

    def _ungrouped(self, layer: LayerNodes, values: str, lengths: list[int]) -> list[str]:
        """Cuts values that lie together by key head into those of all heads."""
        by_head = layer.graph.constant("shape.by_key_head", [0, 0, self._mixer.n_key_heads, -1])
        grouped = layer.graph.node("Reshape", [values, by_head], f"{values}.grouped")
        return [side_by_side(layer, part) for part in layer.split(grouped, lengths, "parts")]

    def _heads(self, layer: LayerNodes, channels: str) -> tuple[str, str, str]:
        """Queries of length 1, keys of length 1 for each value head, and values, side by side."""
        mixer = self._mixer
        of_keys = mixer.n_key_heads * mixer.key_dim
        query, key, value = layer.split(channels, [of_keys, of_keys, mixer.width], "parts")
        query, key = self._of_length_1(layer, query), self._of_length_1(layer, key)
        key = repeated_heads(layer, key, "delta.key_of_value_head", mixer.n_key_heads, mixer.n_value_heads)
        return side_by_side(layer, query), side_by_side(layer, key), value

    def _of_length_1(self, layer: LayerNodes, values: str) -> str:
        """Each head by itself, divided by its length, which an RMS norm does: [batch, sequence, heads, key_dim]."""
        graph, width = layer.graph, self._mixer.key_dim
        by_head = graph.constant("shape.by_key_head", [0, 0, self._mixer.n_key_heads, -1])
        heads = graph.node("Reshape", [values, by_head], f"{values}.heads")
        scales = graph.constant("delta.unit_scales", np.full(width, width**-0.5), np.float32)
        epsilon = self._mixer.key_epsilon / width
        return graph.node("RMSNormalization", [heads, scales], f"{values}.of_length_1", axis=-1, epsilon=epsilon)

    def _decay_and_strength(self, layer: LayerNodes, values: str, tokens: RecurrentTokens) -> tuple[str, str]:
        """For each value head the logarithm of what a token leaves of the state, and how far it corrects it."""
        graph, prefix = layer.graph, f"{layer.prefix}delta."
        strength, decay = self._strength_and_decay_logits(layer, values)
        bias, logarithm = layer.vector(Role.DECAY_BIAS), layer.vector(Role.DECAY_LOGARITHM)
        assert bias is not None and logarithm is not None
        rate = graph.node("Neg", [graph.node("Exp", [logarithm], f"{prefix}rate")], f"{prefix}rate.negative")
        found = [f"{prefix}decay.all", f"{prefix}strength.all"]
        graph.node("LinearAttentionGate", [decay, bias, rate, strength], found, domain=MICROSOFT)
        kept = [graph.node("Mul", [name, tokens.kept], name.removesuffix(".all")) for name in found]
        return kept[0], kept[1]

    def _strength_and_decay_logits(self, layer: LayerNodes, values: str) -> list[str]:
        prefix = f"{layer.prefix}delta."
        if Role.MIXER_BETA_ALPHA not in layer.spec.roles:
            roles = {Role.MIXER_BETA: "strength.logits", Role.MIXER_ALPHA: "decay.logits"}
            return [layer.linear(role, values, f"{prefix}{name}") for role, name in roles.items()]
        both = layer.linear(Role.MIXER_BETA_ALPHA, values, f"{prefix}strength_and_decay")
        return self._ungrouped(layer, both, [self._mixer.n_value_heads // self._mixer.n_key_heads] * 2)
