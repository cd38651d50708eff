"""Quantizes rows of weights with ggml's own kernels, so that we write the same bytes as llama.cpp.

The kernels (:mod:`compressors.model.files.gguf.ggml`; ``ggml_quantize_chunk`` in ``ggml/src/ggml.c``, the formats in
``ggml/src/ggml-quants.c``) work on one row at a time, so the result depends neither on how rows are grouped into calls
nor on the number of threads. Weights are widened to float32 by ggml too, a block of rows at a time: torch would want
threads of its own.

Letters: R rows, N values of a row, Y bytes of a quantized row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.errors import InputError
from compressors.model.files.gguf.ggml import dequantize_into, quantize_into, row_bytes
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType

__all__ = ["checked_importance", "quantize_rows"]

_T = GGMLQuantizationType
_WITHOUT_IMPORTANCE = frozenset({_T.F32, _T.F16, _T.BF16, _T.Q8_0, _T.MXFP4, _T.Q2_0, _T.TQ1_0, _T.TQ2_0})
_NEEDS_IMPORTANCE = frozenset({_T.IQ2_XXS, _T.IQ2_XS, _T.IQ1_S})
"""``ggml_quantize_requires_imatrix`` in ``ggml/src/ggml.c``."""

_STORAGE_TYPES = {torch.bfloat16: GGMLQuantizationType.BF16, torch.float16: GGMLQuantizationType.F16}
_BLOCK_VALUES = 1 << 17  # half a megabyte of float32: widened, checked and quantized while a core's cache holds it


def quantize_rows(
    values_RN: torch.Tensor,
    ggml_type: GGMLQuantizationType,
    importance_N: torch.Tensor | None = None,
    *,
    name: str,
) -> npt.NDArray[np.uint8]:
    """Quantizes rows of float32, bfloat16 or float16 values; returns uint8 [R, Y].

    ``importance_N`` weighs the squared error of each input feature (mean squared activation, llama.cpp's importance
    matrix). One that is zero everywhere belongs to an expert that saw no token; like llama-quantize
    (``load_imatrix`` in ``tools/quantize/quantize.cpp``) we then weigh all features alike, as we do without importance
    if the kernel needs some. The float types, Q8_0, Q2_0, MXFP4 and the ternary types ignore it.

    Raises:
        InputError: a value is not finite, or too large for F16; the message calls the weights ``name``.
    """
    n_rows, row_length = values_RN.shape
    values_RN = values_RN.contiguous()
    importance = checked_importance(importance_N, row_length, name) if ggml_type not in _WITHOUT_IMPORTANCE else None
    if importance is None and ggml_type in _NEEDS_IMPORTANCE:
        importance = np.ones(row_length, dtype=np.float32)
    quantized_RY = np.empty((n_rows, row_bytes(ggml_type, row_length)), dtype=np.uint8)
    rows_per_block = max(1, _BLOCK_VALUES // row_length)
    widened_RN = np.empty((rows_per_block, row_length), dtype=np.float32)
    for first in range(0, n_rows, rows_per_block):
        block_RN = _float32(values_RN[first : first + rows_per_block], widened_RN)
        _check_finite(block_RN, first, name)
        if ggml_type is GGMLQuantizationType.F16:
            _check_range(block_RN, name)
        quantize_into(quantized_RY[first : first + rows_per_block], block_RN, ggml_type, importance)
    return quantized_RY


def _float32(values_RN: torch.Tensor, buffer_RN: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The values as float32, in ``buffer_RN`` unless they are float32 already; every value is exact."""
    if values_RN.dtype == torch.float32:
        return values_RN.numpy()
    widened_RN = buffer_RN[: len(values_RN)]
    stored_RY = values_RN.view(torch.uint8).numpy()
    dequantize_into(stored_RY, _STORAGE_TYPES[values_RN.dtype], torch.from_numpy(widened_RN))
    return widened_RN


def _check_finite(values_RN: npt.NDArray[np.float32], first_row: int, name: str) -> None:
    finite_RN = np.isfinite(values_RN)
    if not finite_RN.all():
        row, feature = np.argwhere(~finite_RN)[0]
        raise InputError(
            f"{name}: value [{first_row + row}, {feature}] is {values_RN[row, feature]}; "
            "NaN and infinity cannot be written"
        )


def _check_range(values_RN: npt.NDArray[np.float32], name: str) -> None:
    """Refuses values that are infinite in F16, as llama-quantize does (``ggml_validate_row_data``)."""
    largest = np.abs(values_RN).max()
    if largest > np.finfo(np.float16).max:
        raise InputError(f"{name}: a value of size {largest} cannot be written as F16; choose BF16 or F32")


def checked_importance(importance_N: torch.Tensor | None, row_length: int, name: str) -> npt.NDArray[np.float32] | None:
    """Importance as the kernels take it: ones where it is zero everywhere.

    Raises:
        InputError: it holds NaN, infinity or a negative value.
    """
    if importance_N is None:
        return None
    assert importance_N.shape == (row_length,), f"{name}: importance {importance_N.shape} for rows of {row_length}"
    checked_N = np.ascontiguousarray(importance_N.numpy(), dtype=np.float32)
    if not np.isfinite(checked_N).all() or (checked_N < 0).any():
        raise InputError(f"{name}: its importance vector holds NaN, infinity or a negative value; calibrate again")
    if not checked_N.any():
        return np.ones_like(checked_N)
    return checked_N
