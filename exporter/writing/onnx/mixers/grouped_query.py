"""Grouped-query attention, by the operator of that name; its cache is keys and values."""

from __future__ import annotations

from typing import Any

from compressors.model.description.mixers import GroupedQuery, OutputGate, QkNorm
from compressors.model.description.onnx_cache import cache_heads
from compressors.model.description.roles import Role
from exporter.writing.onnx.builder import MICROSOFT, GraphBuilder
from exporter.writing.onnx.mixers.cache import add_past, add_present, present_names
from exporter.writing.onnx.padding import AttentionMask
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["GroupedQueryNodes"]


class GroupedQueryNodes:
    """Implements :class:`~exporter.writing.onnx.mixers.registry.MixerNodes`."""

    def __init__(self, mixer: GroupedQuery) -> None:
        self._mixer = mixer
        self._heads = cache_heads(mixer)

    def add(self, layer: LayerNodes, normed: str, mask: AttentionMask) -> str:
        """Adds projections, norms of queries and keys, and attention."""
        mixer, prefix, index = self._mixer, layer.prefix, layer.index
        query, gate = self._query(layer, normed)
        key = layer.linear(Role.KEY, normed, f"{prefix}key", Role.KEY_BIAS)
        value = self._value(layer, normed, key)
        if mixer.turns_before_norms:
            query = self._turned(layer, query, mixer.n_heads, mask)
            key = self._turned(layer, key, mixer.n_kv_heads, mask)
        query = self._norm(layer, Role.QUERY_NORM, query, mixer.n_heads)
        key = self._norm(layer, Role.KEY_NORM, key, mixer.n_kv_heads)
        past = add_past(layer, self._heads)
        rope = None if mixer.turns_before_norms else mixer.rope
        rotary = ("", "") if rope is None else layer.weights.rotary_caches(rope, mask.total_length)
        sinks = layer.vector(Role.SINKS) or ""
        attended = layer.graph.node(
            "GroupQueryAttention",
            [query, key, value, *past, mask.last_positions, mask.total_length, *rotary, "", mask.bias, sinks],
            [f"{prefix}attended", *present_names(index)],
            domain=MICROSOFT,
            num_heads=mixer.n_heads,
            kv_num_heads=mixer.n_kv_heads,
            scale=mixer.scale,
            do_rotary=int(rope is not None),
            rotary_interleaved=int(rope is not None and rope.interleaved),
            **self._window(layer.context_length),
        )
        if gate is not None:
            weight = layer.graph.node("Sigmoid", [gate], f"{prefix}attended.weight")
            attended = layer.graph.node("Mul", [attended, weight], f"{prefix}attended.gated")
        return layer.linear(Role.ATTENTION_OUTPUT, attended, f"{prefix}attention", Role.ATTENTION_OUTPUT_BIAS)

    def add_cache_outputs(self, graph: GraphBuilder, layer: int) -> None:
        """Declares the keys and values of all tokens so far."""
        add_present(graph, layer, self._heads)

    def _query(self, layer: LayerNodes, normed: str) -> tuple[str, str | None]:
        """All queries, and the gates of the output if there are some."""
        graph, mixer, name = layer.graph, self._mixer, f"{layer.prefix}query"
        if not mixer.query_has_gates:
            query = layer.linear(Role.QUERY, normed, name, Role.QUERY_BIAS)
            has_gates = mixer.output_gate is OutputGate.OWN
            return query, layer.linear(Role.ATTENTION_GATE, normed, f"{layer.prefix}gate") if has_gates else None
        both = layer.linear(Role.QUERY, normed, f"{name}.gated", Role.QUERY_BIAS)
        by_head = graph.constant("shape.gated_heads", [0, -1, 2 * mixer.head_dim])
        heads = graph.node("Reshape", [both, by_head], f"{name}.gated.heads")
        parts = layer.split(heads, [mixer.head_dim] * 2, "halves")
        joined = graph.constant(f"shape.{mixer.n_heads}_heads_joined", [0, -1, mixer.width])
        query, gate = (
            graph.node("Reshape", [part, joined], output)
            for part, output in zip(parts, (name, f"{name}.gate"), strict=True)
        )
        return query, gate

    def _value(self, layer: LayerNodes, normed: str, key: str) -> str:
        """The values: by a matrix of their own, or the keys as they are projected."""
        mixer, name = self._mixer, f"{layer.prefix}value"
        value = key if mixer.values_are_keys else layer.linear(Role.VALUE, normed, name, Role.VALUE_BIAS)
        if not mixer.norms_values:
            return value
        heads = self._heads_apart(layer, value, f"{name}.heads")
        return self._joined(
            layer, layer.head_norm(heads, mixer.head_dim, f"{name}.normed_heads"), mixer.n_kv_heads, name
        )

    def _turned(self, layer: LayerNodes, values: str, n_heads: int, mask: AttentionMask) -> str:
        """Turns the projected queries or keys, as the operator would do it behind their norms.

        The scales of the norms then meet turned values, so the products depend on where a text begins.
        """
        rope = self._mixer.rope
        assert mask.in_text is not None and rope is not None
        return layer.graph.node(
            "RotaryEmbedding",
            [values, mask.in_text, *layer.weights.rotary_caches(rope, mask.total_length)],
            f"{values}.turned",
            domain=MICROSOFT,
            interleaved=int(rope.interleaved),
            num_heads=n_heads,
            rotary_embedding_dim=rope.width,
        )

    def _norm(self, layer: LayerNodes, role: Role, values: str, n_heads: int) -> str:
        """Normalises the projected queries or keys as the model does: [batch, sequence, n_heads * head_dim]."""
        if self._mixer.qk_norm is QkNorm.NONE:
            return values
        if self._mixer.qk_norm is QkNorm.WHOLE:
            return layer.rms_norm(role, values, f"{values}.normed")
        normed = layer.rms_norm(role, self._heads_apart(layer, values, f"{values}.heads"), f"{values}.normed_heads")
        return self._joined(layer, normed, n_heads, values)

    def _heads_apart(self, layer: LayerNodes, values: str, output: str) -> str:
        """The heads one by one, each of which is normalised by itself: [batch, sequence * heads, head_dim]."""
        shape = layer.graph.constant("shape.heads", [0, -1, self._mixer.head_dim])
        return layer.graph.node("Reshape", [values, shape], output)

    def _joined(self, layer: LayerNodes, heads: str, n_heads: int, name: str) -> str:
        """The heads of each token side by side again."""
        joined = layer.graph.constant(f"shape.{n_heads}_heads_joined", [0, -1, n_heads * self._mixer.head_dim])
        return layer.graph.node("Reshape", [heads, joined], f"{name}.normed")

    def _window(self, context_length: int) -> dict[str, Any]:
        """The attribute of the window; empty if no text is longer."""
        window = self._mixer.window
        return {} if window is None or window >= context_length else {"local_window_size": window}
