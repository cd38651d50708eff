"""Turns the 2-D attention mask into GroupQueryAttention's inputs, for padding on either side.

The operator knows how many columns of the cache a row uses, which describes padding on the right. For padding on the
left, as transformers does it, the leading columns get a bias that removes them. Rotary embedding is relative, so a
row that starts late needs no other positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from exporter.writing.onnx.builder import GraphBuilder

__all__ = ["AttentionMask", "add_attention_mask"]

_INT32, _INT64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64
_REMOVED = -1e9


@dataclass(frozen=True)
class AttentionMask:
    """Names of the values that every attention node takes."""

    last_positions: str  # int32 [batch]: column of each row's newest token
    total_length: str  # int32: columns of the mask
    bias: str  # float32 [batch, 1, sequence, columns]: 0, or -1e9 before a row's first token


def add_attention_mask(graph: GraphBuilder, input_ids: str, mask: str) -> AttentionMask:
    """Adds the nodes, once for all layers; ``mask`` is int64 [batch, columns] of ones and zeros."""
    zero, one = graph.constant("zero", 0), graph.constant("one", 1)
    last_axis = graph.constant("axis.1", [1])
    mask_int32 = graph.node("Cast", [mask], "mask.int32", to=_INT32)  # ArgMax of int64 is not in every build
    lead = graph.node("ArgMax", [mask_int32], "mask.lead", axis=1, keepdims=0)
    n_tokens = graph.node("ReduceSum", [mask, last_axis], "mask.tokens", keepdims=0)
    end = graph.node("Add", [n_tokens, lead], "mask.end")
    last = graph.node("Sub", [end, one], "mask.last")
    last_int32 = graph.node("Cast", [last], "mask.last_positions", to=_INT32)

    columns = graph.node("Gather", [graph.node("Shape", [mask], "mask.shape"), one], "mask.columns", axis=0)
    total = graph.node("Cast", [columns], "mask.total_length", to=_INT32)

    positions = graph.node("Range", [zero, columns, one], "mask.positions")
    lead_column = graph.node("Unsqueeze", [lead, last_axis], "mask.lead_column")
    is_before = graph.node("Less", [positions, lead_column], "mask.is_before_first")
    removed = graph.constant("bias.removed", _REMOVED, np.float32)
    kept = graph.constant("bias.kept", 0.0, np.float32)
    bias_rows = graph.node("Where", [is_before, removed, kept], "mask.bias_rows")
    bias_heads = graph.node("Unsqueeze", [bias_rows, graph.constant("axes.1_2", [1, 2])], "mask.bias_heads")
    sequence = graph.node("Shape", [input_ids], "sequence.length", start=1, end=2)
    ones = graph.constant("ones", [1])
    bias_shape = graph.node("Concat", [ones, ones, sequence, ones], "mask.bias_shape", axis=0)
    bias = graph.node("Expand", [bias_heads, bias_shape], "mask.bias")
    return AttentionMask(last_int32, total, bias)
