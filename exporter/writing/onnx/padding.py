"""Turns the 2-D attention mask into GroupQueryAttention's inputs, for padding on either side.

The operator knows how many columns of the cache a row uses, which describes padding on the right. For padding on the
left, as transformers does it, the leading columns get a bias that removes them. Rotary embedding is relative, so a
row that starts late needs no other positions; only where norms follow it, tokens are counted from the row's first one.

Where other nodes use the operator's cache, they are told the columns in which it puts tokens. Where states go from
token to token, nodes are told which are tokens. All graphs find each row's last token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx

from compressors.model.description.mixers import GroupedQuery, Latent, Mixer
from exporter.writing.onnx.builder import GraphBuilder

__all__ = ["AttentionMask", "CachedTokens", "RecurrentTokens", "add_attention_mask"]

_FLOAT, _INT32, _INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64
_REMOVED = -1e9


@dataclass(frozen=True)
class CachedTokens:
    """Names of the values that say where the operator puts tokens, for nodes that use its cache beside it."""

    positions: str  # int64 [batch, sequence]: the columns of the tokens
    end: str  # int64 [1]: columns of the mask
    end_of_past: str  # int64 [1]: columns before the tokens of a prompt
    is_step: str  # bool: there is one token
    step_bias: str  # float32 [batch, 1, 1, columns]: 0, or -1e9 where a row's newest token does not see a column


@dataclass(frozen=True)
class RecurrentTokens:
    """Names of the values that keep padding out of states, which go from token to token."""

    kept: str  # float32 [batch, sequence, 1]: 1 for a token, 0 for padding
    end: str  # int64 [batch, 1, 1]: as in :class:`AttentionMask`


@dataclass(frozen=True)
class AttentionMask:
    """Names of the values that the mixers' nodes take."""

    last_positions: str  # int32 [batch]: column of each row's newest token
    total_length: str  # int32: columns of the mask
    bias: str  # float32 [batch, 1, sequence, columns]: 0, or -1e9 before a row's first token
    end_of_tokens: str  # int64 [batch, 1]: tokens and padding, of those that run, up to a row's last token
    cached: CachedTokens | None  # None: the operator does it all
    recurrent: RecurrentTokens | None  # None: there are no states
    in_text: str | None  # int64 [batch, sequence]: tokens counted from their row's first one; None: nobody asks


def add_attention_mask(graph: GraphBuilder, input_ids: str, mask: str, mixers: Iterable[Mixer]) -> AttentionMask:
    """Adds the nodes, once for all layers.

    Args:
        graph: where they go.
        input_ids: int64 [batch, sequence].
        mask: int64 [batch, columns] of ones and zeros.
        mixers: those of all layers.
    """
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
    bias = _add_bias(graph, input_ids, is_before)
    cached = in_text = recurrent = None
    kinds = set(mixers)
    turns_first = any(isinstance(mixer, GroupedQuery) and mixer.turns_before_norms for mixer in kinds)
    if turns_first or any(isinstance(mixer, Latent) for mixer in kinds):
        cached = _add_cached_tokens(graph, (last, columns, positions, is_before))
    if turns_first and cached is not None:
        behind_first = graph.node("Sub", [cached.positions, lead_column], "cached.behind_first")
        in_text = graph.node("Max", [behind_first, zero], "cached.in_text")  # padding has no place
    of_tokens = _add_mask_of_tokens(graph, mask, columns)
    end_of_tokens = _add_end_of_tokens(graph, of_tokens)
    if any(mixer.is_recurrent for mixer in kinds):
        recurrent = _add_recurrent_tokens(graph, of_tokens, end_of_tokens)
    return AttentionMask(last_int32, total, bias, end_of_tokens, cached, recurrent, in_text)


def _numbers(graph: GraphBuilder) -> tuple[str, str]:
    """The numbers added to the logits of columns that are not seen, and of those that are."""
    return graph.constant("bias.removed", _REMOVED, np.float32), graph.constant("bias.kept", 0.0, np.float32)


def _add_bias(graph: GraphBuilder, input_ids: str, is_before: str) -> str:
    """The operator's bias, made of the columns before each row's first token."""
    bias_rows = graph.node("Where", [is_before, *_numbers(graph)], "mask.bias_rows")
    bias_heads = graph.node("Unsqueeze", [bias_rows, graph.constant("axes.1_2", [1, 2])], "mask.bias_heads")
    sequence = graph.node("Shape", [input_ids], "sequence.length", start=1, end=2)
    ones = graph.constant("ones", [1])
    bias_shape = graph.node("Concat", [ones, ones, sequence, ones], "mask.bias_shape", axis=0)
    return graph.node("Expand", [bias_heads, bias_shape], "mask.bias")


def _add_cached_tokens(graph: GraphBuilder, of_mask: tuple[str, str, str, str]) -> CachedTokens:
    """A whole prompt fills the first columns; later tokens follow the last one of their row, as the operator has it.

    Args:
        graph: where the nodes go.
        of_mask: each row's last column, the number of columns, all columns, and those before a row's first token.
    """
    last, columns, numbers, is_before = of_mask
    zero, one, axes = graph.constant("zero", 0), graph.constant("one", 1), graph.constant("axes.1_2", [1, 2])
    axis_0, axis_1 = graph.constant("axis.0", [0]), graph.constant("axis.1", [1])
    length = graph.node("Squeeze", ["sequence.length", axis_0], "cached.length")
    before_newest = graph.node("Sub", [length, one], "cached.before_newest")
    after_past = graph.node("Sub", [last, before_newest], "cached.after_past")
    is_whole = graph.node("Equal", [columns, length], "cached.is_whole")
    first = graph.node("Where", [is_whole, zero, after_past], "cached.first")
    first_column = graph.node("Unsqueeze", [first, axis_1], "cached.first_column")
    tokens = graph.node("Range", [zero, length, one], "cached.tokens")
    positions = graph.node("Add", [first_column, tokens], "cached.positions")
    end = graph.node("Unsqueeze", [columns, axis_0], "cached.end")
    end_of_past = graph.node("Sub", [end, "sequence.length"], "cached.end_of_past")
    is_step = graph.node("Equal", [length, one], "cached.is_step")
    last_column = graph.node("Unsqueeze", [last, axis_1], "cached.last_column")
    is_later = graph.node("Greater", [numbers, last_column], "cached.is_later")
    is_unseen = graph.node("Or", [is_later, is_before], "cached.is_unseen")
    of_rows = graph.node("Where", [is_unseen, *_numbers(graph)], "cached.bias_rows")
    step_bias = graph.node("Unsqueeze", [of_rows, axes], "cached.step_bias")
    return CachedTokens(positions, end, end_of_past, is_step, step_bias)


def _add_mask_of_tokens(graph: GraphBuilder, mask: str, columns: str) -> str:
    """The mask's last columns, which are those of the tokens that run; ``columns`` is the number of all of them."""
    axis_0, axis_1 = graph.constant("axis.0", [0]), graph.constant("axis.1", [1])
    end = graph.node("Unsqueeze", [columns, axis_0], "tokens.columns")
    start = graph.node("Sub", [end, "sequence.length"], "tokens.start")
    return graph.node("Slice", [mask, start, end, axis_1], "tokens.mask")


def _add_end_of_tokens(graph: GraphBuilder, of_tokens: str) -> str:
    """The number of each row's last token, counted from 1 and padding included; 0 if all is padding."""
    one, axis_0, axis_1 = graph.constant("one", 1), graph.constant("axis.0", [0]), graph.constant("axis.1", [1])
    length = graph.node("Squeeze", ["sequence.length", axis_0], "tokens.length")
    after_last = graph.node("Add", [length, one], "tokens.after_last")
    numbers = graph.node("Range", [one, after_last, one], "tokens.numbers")
    of_kept = graph.node("Mul", [of_tokens, numbers], "tokens.numbers_of_kept")
    return graph.node("ReduceMax", [of_kept, axis_1], "tokens.end", keepdims=1)


def _add_recurrent_tokens(graph: GraphBuilder, of_tokens: str, end_of_tokens: str) -> RecurrentTokens:
    axis_2 = graph.constant("axis.2", [2])
    as_numbers = graph.node("Cast", [of_tokens], "recurrent.mask.float32", to=_FLOAT)
    kept = graph.node("Unsqueeze", [as_numbers, axis_2], "recurrent.kept")
    return RecurrentTokens(kept, graph.node("Unsqueeze", [end_of_tokens, axis_2], "recurrent.end"))
