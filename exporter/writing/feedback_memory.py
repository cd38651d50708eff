"""The memory that error feedback needs, in bytes, and the threads that it leaves room for."""

from __future__ import annotations

from compressors.calibration.sizes import KEPT_TOKENS, ROWS_AT_ONCE, TOKENS_AT_ONCE, input_sizes
from compressors.model.description.spec import LayerSpec, ModelSpec

__all__ = ["least_feedback_bytes", "threads_within"]


def threads_within(n_bytes: int, spec: ModelSpec, threads: int) -> int:
    """The number of threads that can choose codes in ``n_bytes`` beside the process itself: 1 to ``threads``."""
    return max(1, min(threads, (n_bytes - _shared_bytes(spec)) // _thread_bytes(spec)))


def least_feedback_bytes(spec: ModelSpec) -> int:
    """Bytes that choosing a student's codes needs beside the process itself, in one thread."""
    return _shared_bytes(spec) + _thread_bytes(spec)


_ARRAYS = 8  # arrays of the moments' size that are alive at once while they are factored
_ACTIVATIONS = 16  # arrays of the widest input's size in a run of a layer without its experts


def _shared_bytes(spec: ModelSpec) -> int:
    """Bytes of experts' inputs and a layer's sums: of one layer, and of the next while the last experts are made."""
    others = max(layer.parameters_beside_experts for layer in spec.layers)
    return 2 * (2 * KEPT_TOKENS * spec.expert_size + _sums_bytes(spec)) + 4 * others


def _thread_bytes(spec: ModelSpec) -> int:
    """Bytes of the largest moments while they are factored, with an expert and its rows; or of blocks in attention."""
    width = max(max(_input_widths(layer)) for layer in spec.layers)
    rows = 4 * ROWS_AT_ONCE * (spec.expert_size + 3 * spec.expert_width)
    expert = 4 * max(layer.expert_parameters for layer in spec.layers) + rows
    factored = 4 * _ARRAYS * max(width, spec.expert_width) ** 2 + expert
    return max(factored, 4 * _ACTIVATIONS * TOKENS_AT_ONCE * width + 2 * _sums_bytes(spec))


def _sums_bytes(spec: ModelSpec) -> int:
    """Bytes of the sums over one layer's tokens."""
    return 4 * max(sum(width**2 for width in _input_widths(layer)) for layer in spec.layers)


def _input_widths(layer: LayerSpec) -> list[int]:
    """The widths of the inputs of a layer's matrices outside of experts, and of the experts' common input."""
    return [*input_sizes(layer).values(), layer.expert_size]
