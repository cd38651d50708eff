"""Quantizing rows of weights in ONNX Runtime's integer blocks, of 2, 4 or 8 bits.

Letters: R rows, N values of a row.
"""

from __future__ import annotations

import numpy as np
import torch

from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.integer_blocks import IntegerBlocks
from compressors.model.files.integer_blocks import search_blocks as search_float32_blocks
from compressors.quantize.kernels import checked_importance, quantize_rows

__all__ = ["search_blocks"]


def search_blocks(
    values_RN: torch.Tensor, bits: int, block_size: int, importance_N: torch.Tensor | None = None, *, name: str
) -> IntegerBlocks:
    """Quantizes rows of float32, bfloat16 or float16 values, as :mod:`compressors.model.files.integer_blocks` explains.

    ``importance_N`` weighs the squared error of each input feature, as in
    :func:`~compressors.quantize.kernels.quantize_rows`.

    Raises:
        InputError: a value is not finite, or the importance is invalid; the message calls the weights ``name``.
    """
    float32_RN = quantize_rows(values_RN, GGMLQuantizationType.F32, name=name).view(np.float32)
    importance = checked_importance(importance_N, values_RN.shape[1], name)
    return search_float32_blocks(float32_RN, bits, block_size, importance)
