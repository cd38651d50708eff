"""Rows in ggml's block formats: the kernel's scales, and codes that feed rounding errors back.

Letters: R rows, N values of a row, Y bytes of a quantized row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType
from compressors.quantize.blocks import search_blocks
from compressors.quantize.feedback import codebook, scalar
from compressors.quantize.feedback.codebook import CODEBOOK_FORMATS
from compressors.quantize.feedback.moments import Feedback
from compressors.quantize.feedback.one_thread import one_thread
from compressors.quantize.feedback.passes import SLICE_ROWS, choose_codes, improve_codes, n_sweeps_for, ordered_columns
from compressors.quantize.feedback.scalar import SCALAR_FORMATS
from compressors.quantize.feedback.scale_fit import refit_scales
from compressors.quantize.feedback.vectors import SIGN_LENGTH
from compressors.quantize.kernels import quantize_rows

__all__ = ["TYPES_WITH_FEEDBACK", "quantize_rows_with_feedback", "searched_q2_0"]

TYPES_WITH_FEEDBACK = frozenset(SCALAR_FORMATS) | frozenset(CODEBOOK_FORMATS)
"""The types whose codes :func:`quantize_rows_with_feedback` chooses."""


@one_thread()
def quantize_rows_with_feedback(
    values_RN: torch.Tensor,
    ggml_type: GGMLQuantizationType,
    importance_N: torch.Tensor | None,
    feedback: Feedback,
    *,
    name: str,
) -> npt.NDArray[np.uint8]:
    """Quantizes rows of float32, bfloat16 or float16 values; returns uint8 [R, Y], as ``quantize_rows`` does.

    Scales and offsets are the kernel's for this importance (Q2_0's are searched); the codes are chosen again, so that
    the error of the outputs is small for the inputs that ``feedback`` describes. Where a block has one float16 scale
    and nothing else (Q5_0, Q4_0, IQ4_NL, Q2_0), the scale is then fitted to the codes.

    The result does not depend on threads. But a matrix has to be passed in the same way each time, whole or in the same
    slices: matrix products of different shapes may round differently.

    Raises:
        InputError: a value is not finite; the message calls the weights ``name``.
    """
    quantized_RY = quantize_rows(values_RN, ggml_type, importance_N, name=name)
    if ggml_type is GGMLQuantizationType.Q2_0:
        quantized_RY = _searched(values_RN, quantized_RY, importance_N, name)
    for first in range(0, len(values_RN), SLICE_ROWS):
        rows = slice(first, first + SLICE_ROWS)
        quantized_RY[rows] = _with_chosen_codes(values_RN[rows], quantized_RY[rows], ggml_type, feedback)
    return quantized_RY


def searched_q2_0(values_RN: torch.Tensor, importance_N: torch.Tensor | None, name: str) -> torch.Tensor:
    """The values of these rows in Q2_0 with searched scales, without feedback: float32 [R, N].

    Raises:
        InputError: a value is not finite; the message calls the weights ``name``.
    """
    length, _ = BLOCK_SIZES[GGMLQuantizationType.Q2_0]
    return torch.from_numpy(search_blocks(values_RN, 2, length, importance_N, name=name).values())


def _searched(
    values_RN: torch.Tensor, quantized_RY: npt.NDArray[np.uint8], importance_N: torch.Tensor | None, name: str
) -> npt.NDArray[np.uint8]:
    """Q2_0 rows with searched scales; the kernel takes the largest magnitudes, which leaves codes unused.

    The levels of Q2_0 are -1 to 2, those of ONNX Runtime's codes -2 to 1: the same with scales of the opposite sign.
    """
    length, _ = BLOCK_SIZES[GGMLQuantizationType.Q2_0]
    mirrored = search_blocks(values_RN, 2, length, importance_N, name=name)
    return scalar.with_scales(quantized_RY, GGMLQuantizationType.Q2_0, -mirrored.scales_RK.T)


def _with_chosen_codes(
    values_RN: torch.Tensor, quantized_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType, feedback: Feedback
) -> npt.NDArray[np.uint8]:
    if ggml_type in CODEBOOK_FORMATS:
        return _with_chosen_vectors(values_RN, quantized_RY, ggml_type, feedback)
    order_N = feedback.order_N(1)
    grid = scalar.grid_of(quantized_RY, ggml_type, order_N)
    ordered_NR, form = ordered_columns(values_RN, order_N), SCALAR_FORMATS[ggml_type]
    errors_NR = choose_codes(ordered_NR, grid, feedback, n_sweeps_for(form.bits))
    if form.fitted_scale:
        refit_scales(grid, errors_NR, feedback)
        improve_codes(ordered_NR, errors_NR, grid, feedback, 1)
        quantized_RY = scalar.with_scales(quantized_RY, ggml_type, grid.scale_SR)
    chosen_NR = grid.codes_NR()
    codes_NR = np.empty_like(chosen_NR)
    codes_NR[order_N.numpy()] = chosen_NR
    return scalar.with_codes(quantized_RY, ggml_type, codes_NR.T)


def _with_chosen_vectors(
    values_RN: torch.Tensor, quantized_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType, feedback: Feedback
) -> npt.NDArray[np.uint8]:
    order_N = feedback.order_N(SIGN_LENGTH)
    grid = codebook.grid_of(quantized_RY, ggml_type, order_N)
    choose_codes(ordered_columns(values_RN, order_N), grid, feedback, CODEBOOK_FORMATS[ggml_type].n_sweeps)
    index_GVR = np.empty(grid.index_GVR.shape, dtype=np.uint16)
    signs_GR = np.empty_like(grid.signs_GR())
    order_G = order_N[::SIGN_LENGTH].numpy() // SIGN_LENGTH
    index_GVR[order_G], signs_GR[order_G] = grid.index_GVR.numpy(), grid.signs_GR()
    return codebook.with_codes(quantized_RY, ggml_type, index_GVR, signs_GR)
