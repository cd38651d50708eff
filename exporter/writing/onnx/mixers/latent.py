"""Latent attention on the small vectors themselves: nothing is made of them for each head of each token of the cache.

A head's key is K c, where c is the small vector of a token, so that q . K c = (K^T q) . c: queries are brought to the
small vector. Of the values, V c, the sum with attention's weights is V times the sum of c. So the cache holds c and the
turned part of the key: for GLM-4.7-Flash an eighteenth of what keys and values take. llama.cpp computes it so as well.

GroupQueryAttention keeps the cache, because no other operator both writes one in place and makes a longer one. Key and
value of its only head are the halves of the vector; what it attends to by them is not used. Attention itself is
another such operator for prompts, whose key and value are the whole vector. In a step all heads' queries are multiplied
at once instead: the operator reads the cache once for each head, which takes 17 times as long (20 heads, 4096 tokens).
"""

from __future__ import annotations

from collections.abc import Sequence

from compressors.model.description.mixers import Latent
from compressors.model.description.onnx_cache import cache_heads
from compressors.model.description.roles import Role
from compressors.model.files.onnx_names import JOINED, LOGITS
from exporter.writing.onnx.builder import MICROSOFT, GraphBuilder
from exporter.writing.onnx.mixers.cache import add_past, add_present, present_names
from exporter.writing.onnx.padding import AttentionMask, CachedTokens
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["LatentNodes"]


class LatentNodes:
    """Implements :class:`~exporter.writing.onnx.mixers.registry.MixerNodes`."""

    def __init__(self, mixer: Latent) -> None:
        self._mixer = mixer
        self._cache = cache_heads(mixer)
        self._width = mixer.rotary_dim + mixer.rank  # the turned part of a key comes first, then the small vector

    def add(self, layer: LayerNodes, normed: str, mask: AttentionMask) -> str:
        """Adds projections, their norms, attention, and the heads' matrices before and behind it."""
        tokens = mask.cached
        assert tokens is not None
        rotary = layer.weights.rotary_caches(self._mixer.rope, mask.total_length)
        query = self._turned(layer, self._query(layer, normed), self._mixer.n_heads, (tokens.positions, *rotary))
        vector = self._turned(layer, self._vector(layer, normed), 1, (tokens.positions, *rotary))
        cached = self._cached(layer, vector, mask, tokens)
        attended = layer.graph.choice(
            tokens.is_step,
            f"{layer.prefix}attended",
            then=lambda: self._of_step(layer, query, cached, tokens),
            otherwise=lambda: self._of_prompt(layer, query, vector, cached, mask, tokens),
        )
        return layer.linear(Role.ATTENTION_OUTPUT, self._values(layer, attended), f"{layer.prefix}attention")

    def add_cache_outputs(self, graph: GraphBuilder, layer: int) -> None:
        """Declares the halves of the vectors of all tokens so far."""
        add_present(graph, layer, self._cache)

    def _query(self, layer: LayerNodes, normed: str) -> str:
        """Each head's query: the part that is to be turned, and the other one brought to the small vector."""
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
        return layer.joined(joined, f"{prefix}query{JOINED}")

    def _vector(self, layer: LayerNodes, normed: str) -> str:
        """The part of the key that is to be turned, and the small vector."""
        mixer, prefix = self._mixer, layer.prefix
        both = layer.linear(Role.KEY_VALUE_A, normed, f"{prefix}key_value_a")
        small, turned = layer.split(both, [mixer.rank, mixer.rotary_dim], "parts")
        small = layer.rms_norm(Role.KEY_VALUE_A_NORM, small, f"{prefix}key_value_a.normed", mixer.inner_epsilon)
        return layer.joined([turned, small], f"{prefix}vector{JOINED}")

    def _turned(self, layer: LayerNodes, values: str, n_heads: int, rotary: tuple[str, str, str]) -> str:
        """Turns the first values of each head."""
        return layer.graph.node(
            "RotaryEmbedding",
            [values, *rotary],
            f"{values}.turned",
            domain=MICROSOFT,
            interleaved=int(self._mixer.rope.interleaved),
            num_heads=n_heads,
            rotary_embedding_dim=self._mixer.rotary_dim,
        )

    def _cached(self, layer: LayerNodes, vector: str, mask: AttentionMask, tokens: CachedTokens) -> list[str]:
        """Caches the vectors; returns the halves of those of all tokens so far: [batch, 1, columns, half]."""
        graph, present = layer.graph, present_names(layer.index)
        halves = layer.split(vector, [self._cache.width] * 2, "halves")
        graph.node(
            "GroupQueryAttention",
            [halves[0], *halves, *add_past(layer, self._cache), mask.last_positions, mask.total_length],
            [f"{layer.prefix}vector.unused", *present],
            domain=MICROSOFT,
            num_heads=1,
            kv_num_heads=1,
        )
        # a cache may have room for more
        return [self._columns(graph, name, tokens.end, f"{name}.so_far") for name in present]

    def _columns(self, graph: GraphBuilder, cache: str, end: str, output: str) -> str:
        """The first columns of a cache."""
        return graph.node("Slice", [cache, graph.constant("axis.0", [0]), end, graph.constant("axis.2", [2])], output)

    def _of_prompt(
        self,
        layer: LayerNodes,
        query: str,
        vector: str,
        cached: Sequence[str],
        mask: AttentionMask,
        tokens: CachedTokens,
    ) -> str:
        """The sums of vectors with attention's weights, of all heads: [batch, sequence, heads * vector]."""
        graph, name = layer.graph, f"{layer.prefix}attended.prompt"
        past = self._columns(graph, layer.joined(cached, f"{name}{JOINED}"), tokens.end_of_past, f"{name}.past")
        return graph.node(
            "GroupQueryAttention",
            [query, vector, vector, past, past, mask.last_positions, mask.total_length, "", "", "", mask.bias],
            [name, f"{name}.keys", f"{name}.values"],
            domain=MICROSOFT,
            num_heads=self._mixer.n_heads,
            kv_num_heads=1,
            scale=self._mixer.scale,
        )

    def _of_step(self, layer: LayerNodes, query: str, cached: Sequence[str], tokens: CachedTokens) -> str:
        """The same of one token: [batch, 1, heads * vector]."""
        graph, name = layer.graph, f"{layer.prefix}attended.step"
        by_head = graph.constant("shape.heads_apart", [0, 1, self._mixer.n_heads, self._width])
        heads = graph.node("Reshape", [query, by_head], f"{name}.heads")
        products = [
            graph.node("FusedMatMul", [half, part], half + LOGITS, domain=MICROSOFT, transB=1, alpha=self._mixer.scale)
            for half, part in zip(layer.split(heads, [self._cache.width] * 2, "halves"), cached, strict=True)
        ]
        logits = graph.node("Add", products, f"{name}.logits")
        seen = graph.node("Add", [logits, tokens.step_bias], f"{name}.seen_logits")
        weights = graph.node("Softmax", [seen], f"{name}.weights", axis=-1)
        sums = [graph.node("MatMul", [weights, part], f"{name}.{half}") for half, part in enumerate(cached)]
        together = graph.constant("shape.heads_together", [0, 1, self._mixer.n_heads * self._width])
        return graph.node("Reshape", [layer.joined(sums, f"{name}{JOINED}"), together], name)

    def _values(self, layer: LayerNodes, attended: str) -> str:
        """The heads' values, summed with attention's weights, side by side."""
        mixer = self._mixer
        parts = layer.split(attended, [mixer.rotary_dim, mixer.rank] * mixer.n_heads, "heads")
        values = layer.products(Role.KEY_VALUE_B, 1, parts[1::2], f"{layer.prefix}value")
        return layer.joined(values, f"{layer.prefix}value{JOINED}")
