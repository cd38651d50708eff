"""Models that no family reads yet, made from descriptions alone: random weights in ONNX files, and their results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressors.model.description.feed_forward import Dense, FeedForward, Routed, Shared
from compressors.model.description.glu import Glu
from compressors.model.description.mixers import GatedDelta, GroupedQuery, Latent, Mamba2, Mixer, QkNorm
from compressors.model.description.roles import Role
from compressors.model.description.rope import Rope, RopeKind
from compressors.model.description.spec import LayerSpec, ModelSpec, Place
from compressors.model.description.tensors import GgufTensor, Kind, NormKind, TensorSpec
from compressors.model.families.shared import latent, mamba2, parts
from compressors.model.files.onnx_blocks import pack
from exporter.writing.onnx.graph import build_model
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE, TensorLayout, plan_tensors

__all__ = ["Reference", "attention", "described_layer", "gated_delta", "latent_attention", "put_values"]
__all__ += ["random_folder", "whole_numbers", "with_layers"]

Floats = npt.NDArray[np.float32]

_LAYER = "model.layers.{layer}."
_VECTORS = {
    Role.QUERY_BIAS: ("self_attn.q_proj.bias", "Q"),
    Role.KEY_BIAS: ("self_attn.k_proj.bias", "K"),
    Role.VALUE_BIAS: ("self_attn.v_proj.bias", "K"),
    Role.ATTENTION_OUTPUT_BIAS: ("self_attn.o_proj.bias", "D"),
    Role.SINKS: ("self_attn.sinks", "H"),
    Role.ROUTER_BIAS: ("mlp.gate.bias", "E"),
    Role.EXPERT_GATE_UP_BIAS: ("mlp.experts.gate_up_proj_bias", "E", "2F"),
    Role.EXPERT_DOWN_BIAS: ("mlp.experts.down_proj_bias", "E", "D"),
}
_SHARED = {
    Role.SHARED_GATE: ("gate_proj", ("S", "D")),
    Role.SHARED_UP: ("up_proj", ("S", "D")),
    Role.SHARED_DOWN: ("down_proj", ("D", "S")),
}


def attention(**changes: Any) -> GroupedQuery:
    """Two key-value heads of 32 values for four query heads, or what ``changes`` say."""
    rope = Rope(RopeKind.DEFAULT, 10_000.0, 32, trained_context=256)
    usual: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "rope": rope, "scale": 1 / math.sqrt(32)}
    return GroupedQuery(**(usual | changes))


def latent_attention(**changes: Any) -> Latent:
    """Three heads of 32 and 16 values on small vectors of 64, or what ``changes`` say."""
    rope = Rope(RopeKind.DEFAULT, 10_000.0, 16, interleaved=True, trained_context=256)
    usual: dict[str, Any] = {"n_heads": 3, "query_rank": 48, "rank": 64, "plain_dim": 32, "rotary_dim": 16}
    usual |= {"value_dim": 16, "rope": rope, "scale": 1 / math.sqrt(48), "inner_epsilon": 0.1}
    return Latent(**(usual | changes))


def gated_delta(**changes: Any) -> GatedDelta:
    """Two key heads and four value heads of 16 and 32 values, or what ``changes`` say."""
    usual = {"n_key_heads": 2, "n_value_heads": 4, "key_dim": 16, "value_dim": 32, "kernel": 4}
    return GatedDelta(**(usual | changes))


def _mixer_tensors(mixer: Mixer, *, is_grouped: bool) -> list[TensorSpec]:
    if isinstance(mixer, Latent):
        return [*latent.mixer_tensors(mixer)]
    if isinstance(mixer, GroupedQuery):
        queries = "P" if mixer.query_has_gates else "Q"
        return [*parts.norms(), *parts.attention_matrices(queries=queries)]
    if isinstance(mixer, Mamba2):
        return [*parts.norms(), *mamba2.tensors(f"{_LAYER}mamba.", has_bias=mixer.n_groups > 1)]
    inputs = _GROUPED_INPUTS if is_grouped else _INPUTS
    matrices = {**inputs, Role.MIXER_OUTPUT: ("out_proj", ("D", "Y"))}
    delta = f"{_LAYER}linear_attn."
    unused = GgufTensor("unused")
    return [
        *parts.norms(NormKind.ONE_PLUS),
        *(TensorSpec(role, f"{delta}{name}.weight", shape, unused) for role, (name, shape) in matrices.items()),
        TensorSpec(Role.CONVOLUTION, f"{delta}conv1d.weight", ("X", "1", "W"), unused, Kind.CONVOLUTION),
        _vector(Role.DECAY_LOGARITHM, "linear_attn.A_log", "N"),
        _vector(Role.DECAY_BIAS, "linear_attn.dt_bias", "N"),
        parts.norm(Role.MIXER_NORM, f"{delta}norm.weight", ("v",), "unused"),
    ]


_INPUTS = {
    Role.MIXER_INPUT: ("in_proj_qkv", ("X", "D")),
    Role.MIXER_GATE: ("in_proj_z", ("Y", "D")),
    Role.MIXER_BETA: ("in_proj_b", ("N", "D")),
    Role.MIXER_ALPHA: ("in_proj_a", ("N", "D")),
}
_GROUPED_INPUTS = {
    Role.MIXER_INPUT: ("in_proj_qkvz", ("M", "D")),
    Role.MIXER_BETA_ALPHA: ("in_proj_ba", ("B", "D")),
}


def described_layer(
    mixer: Mixer,
    feed_forward: FeedForward | None,
    hidden_size: int,
    vectors: tuple[Role, ...] = (),
    *,
    is_grouped: bool = False,
) -> LayerSpec:
    """A layer with all tensors that its parts need, and with biases or sinks of these roles.

    Args:
        mixer: its mixer.
        feed_forward: its feed-forward, if it has one.
        hidden_size: D.
        vectors: the roles of biases and sinks.
        is_grouped: a gated delta rule's inputs lie together by key head.
    """
    tensors = _mixer_tensors(mixer, is_grouped=is_grouped)
    if isinstance(mixer, GroupedQuery) and mixer.qk_norm is not QkNorm.NONE:
        tensors += parts.qk_norm_tensors(mixer.qk_norm)
    tensors += [_vector(role, *_VECTORS[role]) for role in vectors]
    if isinstance(feed_forward, Dense):
        tensors += parts.dense_tensors()
    if isinstance(feed_forward, Routed):
        tensors += [parts.router_tensor(), *parts.expert_tensors(), *_shared_tensors(feed_forward.shared)]
        if feed_forward.routing.has_selection_bias:
            tensors.append(_vector(Role.SELECTION_BIAS, "mlp.gate.e_score_correction_bias", "E"))
    if feed_forward is None:
        tensors = [tensor for tensor in tensors if tensor.role is not Role.MOE_NORM]
    order = list(Role)
    return LayerSpec(mixer, feed_forward, hidden_size, tuple(sorted(tensors, key=lambda t: order.index(t.role))))


def _vector(role: Role, name: str, *shape: str) -> TensorSpec:
    return TensorSpec(role, _LAYER + name, shape, GgufTensor("unused"), Kind.VECTOR)


def _shared_tensors(shared: Shared | None) -> list[TensorSpec]:
    if shared is None:
        return []
    expert = f"{_LAYER}mlp.shared_expert"
    found = [
        TensorSpec(role, f"{expert}.{name}.weight", shape, GgufTensor("unused"))
        for role, (name, shape) in _SHARED.items()
    ]
    gate = TensorSpec(Role.SHARED_ROUTER, f"{expert}_gate.weight", ("1", "D"), GgufTensor("unused"), Kind.ROUTER)
    return [*found, gate] if shared.is_gated else found


def random_folder(spec: ModelSpec, folder: Path, preset: str, encodings: Mapping[str, str] | None = None) -> Path:
    """Writes graph and random weights; those of the embedding are large enough for layers to matter.

    Products of 4 bits have float32 inputs, so that they are exact.
    """
    generator = np.random.default_rng(0)
    layout = plan_tensors(spec, preset, encodings, inputs="float32")
    (folder / MODEL_FILE).write_bytes(build_model(layout).SerializeToString())
    data = np.zeros(layout.data_bytes, dtype=np.uint8)
    for weight in layout.weights:
        n_inputs = weight.shape[-1]
        if weight.scales is None:
            values = generator.standard_normal(weight.shape) / math.sqrt(n_inputs)
            values = 1 + values if len(weight.shape) == 1 and weight.roles[0].endswith("norm") else 2 * values
            put_values(data, weight.codes, values.astype(np.float32))
        else:
            put_values(data, weight.codes, generator.integers(0, 256, weight.codes.shape, dtype=np.uint8))
            scales = (generator.random(weight.scales.shape) + 0.5) / (math.sqrt(n_inputs) * 2**weight.encoding.bits / 4)
            put_values(data, weight.scales, scales.astype(np.float16))
    _put_rotary(data, layout)
    (folder / DATA_FILE).write_bytes(data.tobytes())
    return folder


def _put_rotary(data: npt.NDArray[np.uint8], layout: TensorLayout) -> None:
    spec = layout.spec
    rows = np.arange(spec.context_length, dtype=np.float32)[:, None]
    if spec.rope is None:
        return
    angles = rows * spec.rope.inverse_frequencies(spec.context_length).numpy()
    cosine, sine = layout.rotaries[spec.rope]
    put_values(data, cosine, np.cos(angles))
    put_values(data, sine, np.sin(angles))


def put_values(data: npt.NDArray[np.uint8], tensor: Any, values: npt.NDArray[Any]) -> None:
    """Puts a tensor's values into the bytes of a data file."""
    assert values.dtype == tensor.dtype and values.shape == tensor.shape, tensor.name
    data[tensor.offset : tensor.offset + tensor.n_bytes] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def whole_numbers(layout: TensorLayout, place: Place, values: Mapping[Role, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The rows of a weight of several roles, alternating: values, or codes of 4 bits with scales of 1."""
    weight = layout.weight(*place)
    rows = np.stack([values[role] for role in weight.roles], axis=-2).reshape(weight.shape)
    if weight.scales is None:
        return rows.astype(np.float32)
    return pack((rows + 8).astype(np.uint8).reshape(-1, rows.shape[-1]), 4).reshape(weight.codes.shape)


@dataclass(frozen=True)
class Reference:
    """A described model in numpy, by the definitions of routing and of the function between an expert's products.

    Attributes:
        spec: the model.
        weights: gives a tensor by role and layer; of experts all, [E, rows, columns].
    """

    spec: ModelSpec
    weights: Mapping[Place, Floats]

    def logits(self, tokens: npt.NDArray[np.int64]) -> tuple[Floats, dict[int, tuple[npt.NDArray[np.int64], Floats]]]:
        """Logits [T, V], and the experts [T, K] of each layer that has some, with their weights."""
        states_TD, routing = self.weights[Role.TOKEN_EMBEDDING, None][tokens] * self.spec.embedding_scale, {}
        for index, layer in enumerate(self.spec.layers):
            normed_TD = self._norm(states_TD, Role.ATTENTION_NORM, index)
            states_TD = states_TD + layer.residual_scale * self._attention(layer.mixer, normed_TD, index)
            if layer.feed_forward is None:
                continue
            normed_TD = self._norm(states_TD, Role.MOE_NORM, index)
            if layer.routed is not None:
                routing[index] = self.route(layer.routed, normed_TD, index)
            made_TD = self._feed_forward(layer.feed_forward, normed_TD, index, routing.get(index))
            states_TD = states_TD + layer.residual_scale * made_TD
        logits_TV = self._norm(states_TD, Role.FINAL_NORM, None) @ self.weights[Role.HEAD, None].T
        return logits_TV / self.spec.logit_divisor, routing

    def _norm(self, values: Floats, role: Role, layer: int | None, epsilon: float | None = None) -> Floats:
        squares = np.square(values).mean(-1, keepdims=True)
        epsilon = self.spec.rms_norm_eps if epsilon is None else epsilon
        plus = 0.0 if self.spec.tensor(role, layer).norm is NormKind.PLAIN else 1.0
        return np.asarray(values / np.sqrt(squares + epsilon) * (plus + self.weights[role, layer]))

    def _linear(self, values: Floats, role: Role, layer: int, bias: Role | None = None) -> Floats:
        found = values @ self.weights[role, layer].T
        return found + self.weights[bias, layer] if bias is not None and (bias, layer) in self.weights else found

    def _attention(self, mixer: Mixer, normed_TD: Floats, layer: int) -> Floats:
        if isinstance(mixer, Latent):
            return self._latent_attention(mixer, normed_TD, layer)
        if isinstance(mixer, GatedDelta):
            return self._gated_delta(mixer, normed_TD, layer)
        if isinstance(mixer, Mamba2):
            return self._mamba2(mixer, normed_TD, layer)
        assert isinstance(mixer, GroupedQuery)
        query, key, value = (
            self._linear(normed_TD, role, layer, bias)
            for role, bias in (
                (Role.QUERY, Role.QUERY_BIAS),
                (Role.KEY, Role.KEY_BIAS),
                (Role.VALUE, Role.VALUE_BIAS),
            )
        )
        if mixer.qk_norm is QkNorm.WHOLE:
            query, key = self._norm(query, Role.QUERY_NORM, layer), self._norm(key, Role.KEY_NORM, layer)
        gate = None
        if mixer.query_has_gates:
            query, gate = self._ungrouped(query, mixer.n_heads, [mixer.head_dim])
        heads = [values.reshape(len(values), -1, mixer.head_dim) for values in (query, key, value)]
        if mixer.qk_norm is QkNorm.PER_HEAD:
            heads[0] = self._norm(heads[0], Role.QUERY_NORM, layer)
            heads[1] = self._norm(heads[1], Role.KEY_NORM, layer)
        query, key = (_rotated(values, mixer.rope) for values in heads[:2])
        key, value = (np.repeat(values, mixer.n_heads // mixer.n_kv_heads, axis=1) for values in (key, heads[2]))
        attended = _attended(query, key, value, mixer, self.weights.get((Role.SINKS, layer)))
        attended = attended if gate is None else attended / (1 + np.exp(-gate))
        return self._linear(attended, Role.ATTENTION_OUTPUT, layer, Role.ATTENTION_OUTPUT_BIAS)

    def _ungrouped(self, values: Floats, n_groups: int, places: list[int]) -> list[Floats]:
        """Each group's values cut at these places, and the pieces of all groups side by side."""
        pieces = np.split(values.reshape(len(values), n_groups, -1), places, axis=-1)
        return [piece.reshape(len(values), -1) for piece in pieces]

    def _convolved(self, inputs: Floats, layer: int) -> Floats:
        taps = self.weights[Role.CONVOLUTION, layer][:, 0].T
        padded = np.concatenate([np.zeros((len(taps) - 1, inputs.shape[1]), np.float32), inputs])
        found = sum(padded[place : place + len(inputs)] * tap for place, tap in enumerate(taps))
        found = found + self.weights.get((Role.CONVOLUTION_BIAS, layer), 0)
        return np.asarray(found / (1 + np.exp(-found)))

    def _mamba2(self, mixer: Mamba2, normed_TD: Floats, layer: int) -> Floats:
        """A token at a time."""
        both, n_tokens = self._linear(normed_TD, Role.MIXER_INPUT, layer), len(normed_TD)
        gate, inputs, step = np.split(both, [mixer.width, mixer.width + mixer.channels], axis=-1)
        step = np.log1p(np.exp(step + self.weights[Role.DECAY_BIAS, layer]))
        left = np.exp(-step * np.exp(self.weights[Role.DECAY_LOGARITHM, layer]))
        width, of_keys = mixer.width, mixer.n_groups * mixer.key_dim
        value, *of_groups = np.split(self._convolved(inputs, layer), [width, width + of_keys], axis=-1)
        heads_each = mixer.n_heads // mixer.n_groups
        key, query = (np.repeat(each.reshape(n_tokens, mixer.n_groups, -1), heads_each, axis=1) for each in of_groups)
        value = value.reshape(n_tokens, mixer.n_heads, -1)
        state, found = np.zeros((mixer.n_heads, mixer.head_dim, mixer.key_dim), np.float32), np.zeros_like(value)
        for token in range(n_tokens):
            added = np.einsum("hv,hk->hvk", value[token] * step[token, :, None], key[token])
            state = state * left[token, :, None, None] + added
            found[token] = np.einsum("hvk,hk->hv", state, query[token])
        found = found + value * self.weights[Role.MIXER_SKIP, layer][:, None]
        gated = (found.reshape(n_tokens, -1) * gate / (1 + np.exp(-gate))).reshape(n_tokens, mixer.n_groups, -1)
        unit = gated / np.sqrt(np.square(gated).mean(-1, keepdims=True) + self.spec.rms_norm_eps)
        return self._linear(unit.reshape(n_tokens, -1) * self.weights[Role.MIXER_NORM, layer], Role.MIXER_OUTPUT, layer)

    def _gated_delta(self, mixer: GatedDelta, normed_TD: Floats, layer: int) -> Floats:
        """A token at a time."""
        n_tokens, width = len(normed_TD), mixer.key_dim
        inputs, gate, strength, decay = self._inputs_of_delta(mixer, normed_TD, layer)
        convolved = self._convolved(inputs, layer)
        *keys, value = np.split(convolved, [mixer.n_key_heads * width, 2 * mixer.n_key_heads * width], axis=-1)
        heads = (of_keys.reshape(n_tokens, -1, width) for of_keys in keys)
        units = (values / np.sqrt(np.square(values).sum(-1, keepdims=True) + 1e-6) for values in heads)
        query, key = (np.repeat(unit, mixer.n_value_heads // mixer.n_key_heads, axis=1) for unit in units)
        value = value.reshape(n_tokens, mixer.n_value_heads, -1)
        rate = np.exp(self.weights[Role.DECAY_LOGARITHM, layer])
        left = np.exp(-rate * np.log1p(np.exp(decay + self.weights[Role.DECAY_BIAS, layer])))
        state, found = np.zeros((mixer.n_value_heads, width, mixer.value_dim), np.float32), np.zeros_like(value)
        for token in range(n_tokens):
            state = state * left[token, :, None, None]
            error = value[token] - np.einsum("hkv,hk->hv", state, key[token])
            error = error / (1 + np.exp(-strength[token]))[:, None]
            state = state + key[token][..., None] * error[:, None]
            found[token] = np.einsum("hkv,hk->hv", state, query[token]) / math.sqrt(width)
        normed = self._norm(found, Role.MIXER_NORM, layer).reshape(n_tokens, -1)
        return self._linear(normed * gate / (1 + np.exp(-gate)), Role.MIXER_OUTPUT, layer)

    def _inputs_of_delta(self, mixer: GatedDelta, normed_TD: Floats, layer: int) -> list[Floats]:
        """The convolution's inputs, the output's gates, and the logits of strength and decay."""
        if (Role.MIXER_GATE, layer) in self.weights:
            return [self._linear(normed_TD, role, layer) for role in _INPUTS]
        n_heads, width, of_values = mixer.n_key_heads, mixer.key_dim, mixer.width // mixer.n_key_heads
        both = self._linear(normed_TD, Role.MIXER_INPUT, layer)
        *parts, gate = self._ungrouped(both, n_heads, [width, 2 * width, 2 * width + of_values])
        both = self._linear(normed_TD, Role.MIXER_BETA_ALPHA, layer)
        return [np.concatenate(parts, axis=-1), gate, *self._ungrouped(both, n_heads, [mixer.n_value_heads // n_heads])]

    def _latent_attention(self, mixer: Latent, normed_TD: Floats, layer: int) -> Floats:
        """With keys and values made for each head."""
        query = normed_TD
        if mixer.query_rank is not None:
            small = self._linear(query, Role.QUERY_A, layer)
            query = self._norm(small, Role.QUERY_A_NORM, layer, mixer.inner_epsilon)
        query = self._linear(query, Role.QUERY if mixer.query_rank is None else Role.QUERY_B, layer)
        plain, turned = np.split(query.reshape(len(query), -1, mixer.key_dim), [mixer.plain_dim], axis=-1)
        query = np.concatenate([plain, _rotated(turned, mixer.rope)], axis=-1)
        small, of_key = np.split(self._linear(normed_TD, Role.KEY_VALUE_A, layer), [mixer.rank], axis=-1)
        small = self._norm(small, Role.KEY_VALUE_A_NORM, layer, mixer.inner_epsilon)
        both = self._linear(small, Role.KEY_VALUE_B, layer).reshape(len(query), mixer.n_heads, -1)
        plain, value = np.split(both, [mixer.plain_dim], axis=-1)
        turned = np.repeat(_rotated(of_key[:, None], mixer.rope), mixer.n_heads, axis=1)
        attended = _attended(query, np.concatenate([plain, turned], axis=-1), value, mixer)
        return self._linear(attended, Role.ATTENTION_OUTPUT, layer)

    def route(self, routed: Routed, normed_TD: Floats, layer: int) -> tuple[npt.NDArray[np.int64], Floats]:
        """Experts [T, K] of a layer and their weights, given what its router reads."""
        logits_TE = self._linear(normed_TD, Role.ROUTER, layer, Role.ROUTER_BIAS)
        chosen_TK = routed.routing.choose(logits_TE, routed.top_k, self.weights.get((Role.SELECTION_BIAS, layer)))
        return chosen_TK, routed.routing.weights(logits_TE, chosen_TK)

    def _feed_forward(
        self, block: FeedForward, normed_TD: Floats, layer: int, routing: tuple[npt.NDArray[np.int64], Floats] | None
    ) -> Floats:
        gate, up, down = (self.weights[role, layer] for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN))
        if isinstance(block, Dense):
            return _neurons(normed_TD, gate, up, down, block.glu)
        assert routing is not None
        chosen_TK, weights_TK = routing
        found_TD = np.zeros_like(normed_TD)
        for expert in range(block.n_experts):
            weight_T1 = (weights_TK * (chosen_TK == expert)).sum(1, keepdims=True)
            biases = self._expert_biases(layer, expert)
            found_TD += weight_T1 * _neurons(normed_TD, gate[expert], up[expert], down[expert], block.glu, biases)
        return found_TD if block.shared is None else found_TD + self._shared(block, normed_TD, layer)

    def _expert_biases(self, layer: int, expert: int) -> tuple[Floats, Floats, Floats] | None:
        """The biases of an expert's gate, up and down; None if it has none."""
        if (Role.EXPERT_DOWN_BIAS, layer) not in self.weights:
            return None
        alternating = self.weights[Role.EXPERT_GATE_UP_BIAS, layer][expert]
        return alternating[::2], alternating[1::2], self.weights[Role.EXPERT_DOWN_BIAS, layer][expert]

    def _shared(self, block: Routed, normed_TD: Floats, layer: int) -> Floats:
        matrices = (self.weights[role, layer] for role in (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN))
        found_TD = _neurons(normed_TD, *matrices, block.glu)
        assert block.shared is not None
        if not block.shared.is_gated:
            return found_TD
        return np.asarray(found_TD / (1 + np.exp(-self._linear(normed_TD, Role.SHARED_ROUTER, layer))))


def _neurons(
    normed_TD: Floats,
    gate: Floats,
    up: Floats,
    down: Floats,
    glu: Glu,
    biases: tuple[Floats | float, Floats | float, Floats | float] | None = None,
) -> Floats:
    of_gate, of_up, of_down = biases or (0.0, 0.0, 0.0)
    hidden = glu.apply(normed_TD @ gate.T + of_gate if glu.is_gated else None, normed_TD @ up.T + of_up)
    return hidden @ down.T + of_down


def _attended(
    query: Floats, key: Floats, value: Floats, mixer: GroupedQuery | Latent, sinks_H: Floats | None = None
) -> Floats:
    """The values of all heads [T, H, d], weighed by attention, side by side; a sink is one more logit of its head."""
    scores_HTT = np.einsum("thd,uhd->htu", query, key) * mixer.scale
    distance_TT = np.arange(len(query))[:, None] - np.arange(len(query))
    is_seen = (distance_TT >= 0) & (distance_TT < (mixer.window or len(query)))
    largest_HT1 = scores_HTT.max(-1, keepdims=True)
    powers_HTT = np.where(is_seen, np.exp(scores_HTT - largest_HT1), 0)
    sums_HT1 = powers_HTT.sum(-1, keepdims=True)
    if sinks_H is not None:
        sums_HT1 = sums_HT1 + np.exp(sinks_H[:, None, None] - largest_HT1)
    attended = np.einsum("htu,uhd->thd", powers_HTT / sums_HT1, value)
    return np.asarray(attended.reshape(len(query), -1))


def _rotated(values_THd: Floats, rope: Rope | None) -> Floats:
    """Turns the first values of each head: neighbours together, or those of one half with those of the other."""
    if rope is None:
        return values_THd
    if rope.interleaved:
        turned_THd = np.concatenate([values_THd[..., : rope.width : 2], values_THd[..., 1 : rope.width : 2]], axis=-1)
        turned_THd = _rotated(turned_THd, replace(rope, interleaved=False))
        neighbours = np.stack(np.split(turned_THd, 2, axis=-1), axis=-1).reshape(turned_THd.shape)
        return np.concatenate([neighbours, values_THd[..., rope.width :]], axis=-1)
    half = rope.width // 2
    angles = np.arange(len(values_THd))[:, None] * rope.inverse_frequencies(len(values_THd)).numpy()
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second, rest = np.split(values_THd, [half, 2 * half], axis=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine, rest)
    return np.concatenate(turned, axis=-1).astype(np.float32)


def with_layers(spec: ModelSpec, *layers: LayerSpec) -> ModelSpec:
    """A small model of these layers, with everything else of another one's."""
    return replace(spec, layers=layers, hidden_size=layers[0].hidden_size, vocab_size=96, context_length=256)
