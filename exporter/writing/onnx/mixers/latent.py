"""Latent attention by the operator of grouped-query attention, with one key-value head of which both are one vector.

A head's key is K c, where c is the small vector of a token, so that q . K c = (K^T q) . c: queries are brought to the
small vector, and nothing is made of it for each head. Of the values, V c, the operator sums c with its weights, and V
is multiplied with the sum. So the cache holds c and the turned part of the key: for GLM-4.7-Flash a ninth of what keys
and values take. llama.cpp computes it in the same way.

The turned part comes first, because the operator turns the first values of a head. It sums those of the vector too,
and nothing reads the sum.
"""

from __future__ import annotations

from compressors.model.description.mixers import Latent
from compressors.model.description.onnx_heads import operator_heads
from compressors.model.description.roles import Role
from exporter.writing.onnx.builder import MICROSOFT, GraphBuilder
from exporter.writing.onnx.mixers.cache import add_past, add_present, present_names
from exporter.writing.onnx.padding import AttentionMask
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["LatentNodes"]


class LatentNodes:
    """Implements :class:`~exporter.writing.onnx.mixers.registry.MixerNodes`."""

    def __init__(self, mixer: Latent) -> None:
        self._mixer = mixer
        self._heads = operator_heads(mixer)

    def add(self, layer: LayerNodes, normed: str, mask: AttentionMask) -> str:
        """Adds projections, their norms, attention, and the heads' matrices before and behind it."""
        mixer, graph, prefix = self._mixer, layer.graph, layer.prefix
        query, latent = self._query(layer, normed), self._latent(layer, normed)
        past = add_past(graph, layer.index, self._heads)
        rotary = layer.weights.rotary_caches(mask.total_length)
        attended = graph.node(
            "GroupQueryAttention",
            [query, latent, latent, *past, mask.last_positions, mask.total_length, *rotary, "", mask.bias],
            [f"{prefix}attended", *present_names(layer.index)],
            domain=MICROSOFT,
            num_heads=self._heads.n_heads,
            kv_num_heads=self._heads.n_kv_heads,
            scale=mixer.scale,
            do_rotary=1,
            rotary_interleaved=int(mixer.rope.interleaved),
        )
        return layer.linear(Role.ATTENTION_OUTPUT, self._values(layer, attended), f"{prefix}attention")

    def add_cache_outputs(self, graph: GraphBuilder, layer: int) -> None:
        """Declares the vectors of all tokens so far."""
        add_present(graph, layer, self._heads)

    def _query(self, layer: LayerNodes, normed: str) -> str:
        """Each head's query: the part that is turned, and the other one brought to the small vector."""
        mixer, prefix = self._mixer, layer.prefix
        if mixer.query_rank is None:
            query = layer.linear(Role.QUERY, normed, f"{prefix}query")
        else:
            small = layer.linear(Role.QUERY_A, normed, f"{prefix}query_a")
            small = layer.rms_norm(Role.QUERY_A_NORM, small, f"{prefix}query_a.normed", mixer.inner_epsilon)
            query = layer.linear(Role.QUERY_B, small, f"{prefix}query")
        parts = layer.split(query, [mixer.plain_dim, mixer.rotary_dim] * mixer.n_heads, "heads")
        brought = layer.products(Role.KEY_VALUE_B, 0, parts[::2], f"{prefix}query.brought")
        joined = [part for pair in zip(parts[1::2], brought, strict=True) for part in pair]
        return layer.joined(joined, f"{prefix}query.joined")

    def _latent(self, layer: LayerNodes, normed: str) -> str:
        """The part of the key that is to be turned, and the small vector."""
        mixer, prefix = self._mixer, layer.prefix
        both = layer.linear(Role.KEY_VALUE_A, normed, f"{prefix}key_value_a")
        small, turned = layer.split(both, [mixer.rank, mixer.rotary_dim], "parts")
        small = layer.rms_norm(Role.KEY_VALUE_A_NORM, small, f"{prefix}key_value_a.normed", mixer.inner_epsilon)
        return layer.joined([turned, small], f"{prefix}latent.joined")

    def _values(self, layer: LayerNodes, attended: str) -> str:
        """The heads' values, summed with attention's weights, side by side."""
        mixer = self._mixer
        parts = layer.split(attended, [mixer.rotary_dim, mixer.rank] * mixer.n_heads, "heads")
        values = layer.products(Role.KEY_VALUE_B, 1, parts[1::2], f"{layer.prefix}value")
        return layer.joined(values, f"{layer.prefix}value.joined")
