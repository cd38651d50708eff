"""Rows in ggml's block formats: the kernel's scales, and codes that feed rounding errors back.

Letters: R rows, N values of a row, Y bytes of a quantized row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.ggml_types import GGMLQuantizationType
from compressors.quantize.feedback.moments import Feedback
from compressors.quantize.feedback.passes import choose_codes
from compressors.quantize.feedback.scalar import SCALAR_FORMATS, grid_of, with_codes
from compressors.quantize.kernels import quantize_rows

__all__ = ["TYPES_WITH_FEEDBACK", "quantize_rows_with_feedback"]

TYPES_WITH_FEEDBACK = frozenset(SCALAR_FORMATS)
"""The types whose codes :func:`quantize_rows_with_feedback` chooses."""

_SLICE_ROWS = 1024
"""Rows that are rounded together: a column of them fits a core's first cache."""


def quantize_rows_with_feedback(
    values_RN: torch.Tensor,
    ggml_type: GGMLQuantizationType,
    importance_N: torch.Tensor | None,
    feedback: Feedback,
    *,
    name: str,
) -> npt.NDArray[np.uint8]:
    """Quantizes rows of float32, bfloat16 or float16 values; returns uint8 [R, Y], as ``quantize_rows`` does.

    Scales and offsets are the kernel's for this importance; the codes are chosen again, so that the error of the
    outputs over the inputs that ``feedback`` tells of is small.

    Raises:
        InputError: a value is not finite; the message calls the weights ``name``.
    """
    quantized_RY = quantize_rows(values_RN, ggml_type, importance_N, name=name)
    for first in range(0, len(values_RN), _SLICE_ROWS):
        rows = slice(first, first + _SLICE_ROWS)
        quantized_RY[rows] = _with_chosen_codes(values_RN[rows], quantized_RY[rows], ggml_type, feedback)
    return quantized_RY


def _with_chosen_codes(
    values_RN: torch.Tensor, quantized_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType, feedback: Feedback
) -> npt.NDArray[np.uint8]:
    order_N = feedback.order_N(1)
    grid = grid_of(quantized_RY, ggml_type, order_N)
    ordered_NR = values_RN.float().T[order_N].contiguous()
    choose_codes(ordered_NR, grid, feedback, SCALAR_FORMATS[ggml_type].n_sweeps)
    codes_NR = np.empty(ordered_NR.shape, dtype=np.uint8)
    codes_NR[order_N.numpy()] = grid.codes_NR()
    return with_codes(quantized_RY, ggml_type, codes_NR.T)
