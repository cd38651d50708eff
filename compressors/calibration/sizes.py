"""The sizes of what calibration keeps, known before anything is run, and the numbers of tokens that decide them."""

from __future__ import annotations

from math import prod

from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import Kind, TensorSpec

__all__ = [
    "KEPT_TOKENS",
    "ROWS_AT_ONCE",
    "TARGET_BYTES",
    "TOKENS_AT_ONCE",
    "TOP_TOKENS",
    "head_input_bytes",
    "input_sizes",
    "layer_input_bytes",
    "log_prob_bytes",
    "matrices_beside_experts",
    "matrices_with_own_input",
    "n_kept_blocks",
    "statistics_bytes",
    "sum_sizes",
]

KEPT_TOKENS = 32_000
"""About 1,000 tokens per expert give most of what error feedback can; with 8 of 128 experts, 32,000 are twice that."""

TOP_TOKENS = 64
TARGET_BYTES = 8 * TOP_TOKENS
"""Bytes on disk of one training token's targets."""

TOKENS_AT_ONCE = 1024
"""Tokens that one thread runs through a layer at a time: activations then take about as much memory as the sums."""

ROWS_AT_ONCE = 4096
"""Rows of one expert that are widened to float32 at a time."""


def n_kept_blocks(n_blocks: int, block_length: int) -> int:
    """The number of a text's first blocks whose layer inputs are kept: at least one, and at most ``n_blocks``."""
    return min(n_blocks, max(1, KEPT_TOKENS // block_length))


def layer_input_bytes(spec: ModelSpec, n_tokens: int) -> int:
    """The most bytes on disk that the layer inputs of a text of ``n_tokens`` tokens take."""
    return (spec.n_layers + 1) * min(n_tokens, KEPT_TOKENS) * spec.hidden_size * 2


def head_input_bytes(n_positions: int, hidden_size: int) -> int:
    """Bytes on disk of inputs of the head in float32 (:mod:`compressors.model.predictions.head_inputs`)."""
    return 4 * n_positions * hidden_size


def log_prob_bytes(n_positions: int, vocab_size: int) -> int:
    """Bytes on disk of coded log-probabilities (:mod:`compressors.model.predictions.log_probs`).

    The few bytes of the arrays' headers are left out.
    """
    return n_positions * (2 * vocab_size + 8)


def statistics_bytes(layer: LayerSpec) -> int:
    """Bytes of a layer's statistics, float64."""
    return 8 * sum(
        prod(size) for size in (*sum_sizes(layer).values(), *((size,) for size in input_sizes(layer).values()))
    )


def sum_sizes(layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    """The shape of each sum of :class:`~compressors.calibration.statistics.LayerStatistics`, by name."""
    n_experts = layer.n_experts
    by_expert = (
        *("count_E", "gate_sum_E", "norm_sum_E", "gate_norm_sum_E", "norm_square_sum_E", "norm_max_E"),
        *("output_max_E", "router_probability_sum_E"),
    )
    return {
        **dict.fromkeys(("n_tokens", "moe_cosine_sum", "block_cosine_sum"), ()),
        **dict.fromkeys(by_expert, (n_experts,)),
        "output_sum_ED": (n_experts, layer.expert_size),
        "gate_up_input_square_ED": (n_experts, layer.expert_size),
        "down_input_square_EF": (n_experts, layer.expert_width),
        "router_logit_gram_EE": (n_experts, n_experts),
    }


def matrices_beside_experts(layer: LayerSpec) -> tuple[TensorSpec, ...]:
    """The matrices of a layer that files may quantize, except those of its routed experts, and tables of tokens."""
    return tuple(tensor for tensor in layer.shared_tensors if tensor.kind is Kind.MATRIX)


def matrices_with_own_input(layer: LayerSpec) -> tuple[TensorSpec, ...]:
    """The first of the matrices beside experts that are multiplied with the same values, for each such input."""
    return tuple(tensor for tensor in matrices_beside_experts(layer) if tensor.input_role is tensor.role)


def input_sizes(layer: LayerSpec) -> dict[Role, int]:
    """The number of values in each different input of these matrices."""
    return {tensor.role: layer.dimensions(tensor)[-1] for tensor in matrices_with_own_input(layer)}
