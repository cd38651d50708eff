"""The decoder as an ONNX graph: grouped-query attention with rotary embedding, and a MoE block (or, in a dense
model, a feed-forward) in every layer.

Inputs and outputs have the names that onnxruntime-genai and optimum expect. The graph serves prompts and single
steps, any batch size, and padding on either side.
"""

from __future__ import annotations

import math

import onnx

from compressors.model.description.mixers import QkNorm
from compressors.model.description.roles import Role
from exporter.writing.onnx.builder import MICROSOFT, GraphBuilder
from exporter.writing.onnx.layout import TensorLayout
from exporter.writing.onnx.padding import AttentionMask, add_attention_mask
from exporter.writing.onnx.weights import WeightNodes

__all__ = ["build_model"]

_FLOAT, _INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def build_model(layout: TensorLayout) -> onnx.ModelProto:
    """The whole graph; its weights are references into the data file that ``layout`` describes."""
    return _Decoder(layout).build()


class _Decoder:
    def __init__(self, layout: TensorLayout) -> None:
        self._spec = layout.spec
        self._graph = GraphBuilder()
        self._weights = WeightNodes(self._graph, layout)

    def build(self) -> onnx.ModelProto:
        graph, shape = self._graph, self._spec
        input_ids = graph.add_input("input_ids", _INT64, ["batch", "sequence"])
        mask = graph.add_input("attention_mask", _INT64, ["batch", "total_sequence"])
        # Connected to nothing: rotary positions count up from the cache. Clients that feed them expect the name.
        graph.add_input("position_ids", _INT64, ["batch", "sequence"])
        attention_mask = add_attention_mask(graph, input_ids, mask)
        residual = self._weights.embedding(input_ids, "embedding")
        branch: str | None = None  # what the last block made, not yet added to the residual stream
        for layer in range(shape.n_layers):
            normed, residual = self._norm(Role.ATTENTION_NORM, layer, residual, branch)
            branch = self._attention(layer, normed, attention_mask)
            if shape.layer(layer).has_moe:
                normed, residual = self._norm(Role.MOE_NORM, layer, residual, branch)
                branch = self._feed_forward(layer, normed) if shape.is_dense else self._moe(layer, normed)
        normed, _ = self._norm(Role.FINAL_NORM, None, residual, branch)
        self._weights.linear(Role.HEAD, None, normed, "logits")
        graph.add_output("logits", _FLOAT, ["batch", "sequence", shape.vocab_size])
        dimensions: list[str | int] = ["batch", shape.n_kv_heads, "present_sequence", shape.head_dim]
        for layer in range(shape.n_layers):
            for kind in ("key", "value"):
                graph.add_output(f"present.{layer}.{kind}", _FLOAT, dimensions)
        return graph.model(shape.written.model_type)

    def _norm(self, role: Role, layer: int | None, residual: str, branch: str | None) -> tuple[str, str]:
        """Adds the branch to the residual stream and normalises; returns the normed values and the new residual."""
        prefix = _prefix(layer) + role.replace(" ", "_")
        if branch is None:
            return self._rms_norm(role, layer, residual, prefix), residual
        outputs = [prefix, "", "", f"{prefix}.residual"]
        inputs = [branch, residual, self._weights.norm(role, layer)]
        normed = self._graph.node(
            "SkipSimplifiedLayerNormalization",
            inputs,
            outputs,
            domain=MICROSOFT,
            epsilon=self._spec.rms_norm_eps,
        )
        return normed, outputs[-1]

    def _attention(self, layer: int, normed: str, mask: AttentionMask) -> str:
        shape, prefix = self._spec, _prefix(layer)
        query = self._weights.linear(Role.QUERY, layer, normed, f"{prefix}query")
        key = self._weights.linear(Role.KEY, layer, normed, f"{prefix}key")
        value = self._weights.linear(Role.VALUE, layer, normed, f"{prefix}value")
        query = self._query_or_key_norm(Role.QUERY_NORM, layer, query, shape.n_heads)
        key = self._query_or_key_norm(Role.KEY_NORM, layer, key, shape.n_kv_heads)
        past = [self._past(layer, kind) for kind in ("key", "value")]
        rotary = self._weights.rotary_caches(mask.total_length)
        attended = self._graph.node(
            "GroupQueryAttention",
            [query, key, value, *past, mask.last_positions, mask.total_length, *rotary, "", mask.bias],
            [f"{prefix}attended", f"present.{layer}.key", f"present.{layer}.value"],
            domain=MICROSOFT,
            num_heads=shape.n_heads,
            kv_num_heads=shape.n_kv_heads,
            scale=1.0 / math.sqrt(shape.head_dim),
            do_rotary=1,
            rotary_interleaved=0,
        )
        return self._weights.linear(Role.ATTENTION_OUTPUT, layer, attended, f"{prefix}attention")

    def _query_or_key_norm(self, role: Role, layer: int, values: str, n_heads: int) -> str:
        """Normalises the projected queries or keys as the family does: [batch, sequence, n_heads * head_dim]."""
        qk_norm = self._spec.layers[layer].mixer.qk_norm
        if qk_norm is QkNorm.NONE:
            return values
        if qk_norm is QkNorm.WHOLE:
            return self._rms_norm(role, layer, values, f"{values}.normed")
        graph, width = self._graph, self._spec.head_dim
        # every head by itself: [batch, sequence * heads, head_dim] in between
        heads = graph.node("Reshape", [values, graph.constant("shape.heads", [0, -1, width])], f"{values}.heads")
        normed = self._rms_norm(role, layer, heads, f"{values}.normed_heads")
        joined = graph.constant(f"shape.{n_heads}_heads_joined", [0, -1, n_heads * width])
        return graph.node("Reshape", [normed, joined], f"{values}.normed")

    def _rms_norm(self, role: Role, layer: int | None, values: str, output: str) -> str:
        """Normalises the last axis."""
        scale = self._weights.norm(role, layer)
        epsilon = self._spec.rms_norm_eps
        return self._graph.node("RMSNormalization", [values, scale], output, axis=-1, epsilon=epsilon)

    def _past(self, layer: int, kind: str) -> str:
        """The cache as it comes in.

        Its heads and their width are declared as unknown, because optimum guesses them from ``config.json`` and
        guesses wrong for an empty cache; the Reshape says what they are.
        """
        name = f"past_key_values.{layer}.{kind}"
        self._graph.add_input(name, _FLOAT, ["batch", "past_heads", "past_sequence", "past_head_dim"])
        shape = [0, self._spec.n_kv_heads, 0, self._spec.head_dim]
        return self._graph.node("Reshape", [name, self._graph.constant("shape.past", shape)], f"{name}.shaped")

    def _moe(self, layer: int, normed: str) -> str:
        graph, prefix = self._graph, _prefix(layer)
        logits = self._weights.linear(Role.ROUTER, layer, normed, f"{prefix}router")
        n_experts = self._spec.layer(layer).n_experts
        rows = graph.constant(f"shape.router_of_{n_experts}", [-1, n_experts])
        logits_TE = graph.node("Reshape", [logits, rows], f"{prefix}router_logits")
        return self._weights.experts(layer, normed, logits_TE, f"{prefix}moe")

    def _feed_forward(self, layer: int, normed: str) -> str:
        """The one expert of a dense model's layer: SwiGLU as silu(gate) * up, silu(x) being x * sigmoid(x)."""
        graph, prefix = self._graph, f"{_prefix(layer)}feed_forward"
        gate = self._weights.linear(Role.EXPERT_GATE, layer, normed, f"{prefix}.gate")
        up = self._weights.linear(Role.EXPERT_UP, layer, normed, f"{prefix}.up")
        sigmoid = graph.node("Sigmoid", [gate], f"{prefix}.sigmoid")
        silu = graph.node("Mul", [gate, sigmoid], f"{prefix}.silu")
        hidden = graph.node("Mul", [silu, up], f"{prefix}.hidden")
        return self._weights.linear(Role.EXPERT_DOWN, layer, hidden, prefix)


def _prefix(layer: int | None) -> str:
    return "" if layer is None else f"layers.{layer}."
