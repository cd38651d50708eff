"""Formats that store an index into a table of vectors and the signs of their values, for eight values at a time.

value = scale x entry of the vector x sign. As in :mod:`compressors.quantize.feedback.scalar`, only the places of the
codes are stated here (``block_iq*`` in ``ggml/src/ggml-common.h``); ggml gives tables and scales, when it reads blocks
whose codes are all the same. The IQ3 formats have two vectors of four values under eight signs. The XXS and XS formats
store seven signs: the eighth makes the number of minus signs even.

Letters: R rows, N values of a row, K blocks of a row, Y bytes of a block or row, G groups of eight values.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.files.gguf.ggml import dequantize_rows
from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType
from compressors.quantize.feedback.fields import Fields, bit_planes, copied_blocks, write_codes
from compressors.quantize.feedback.vectors import SIGN_LENGTH, VectorGrid, VectorTable

__all__ = ["CODEBOOK_FORMATS", "CodebookFormat", "grid_of", "table_of", "with_codes"]

_T = GGMLQuantizationType
_BLOCK_LENGTH = 256
_ONE = np.frombuffer(np.float16(1).tobytes(), dtype=np.uint8)


@dataclass(frozen=True)
class CodebookFormat:
    """The codes of one type."""

    index: tuple[Fields, ...]
    signs: tuple[Fields, ...]
    vector_length: int
    scale_length: int  # neighbouring values that share a scale
    n_sweeps: int = 2

    @property
    def even_signs(self) -> bool:
        """True if the number of minus signs in eight values is always even."""
        return sum(run.width for run in self.signs) == SIGN_LENGTH - 1


def _bytes(first_bytes: Sequence[int]) -> Fields:
    """The fields of codes, or of their low eight bits, in bytes of their own."""
    return Fields.of(0, 8, [(byte, 0) for byte in first_bytes])


def _iq2_xxs() -> CodebookFormat:
    """Every 32 values: four bytes of indices, then four times seven signs and a scale of four bits."""
    index = _bytes([2 + k // 4 * 8 + k % 4 for k in range(32)])
    return CodebookFormat((index,), bit_planes(0, 7, [(6 + k // 4 * 8) * 8 + k % 4 * 7 for k in range(32)]), 8, 32)


def _iq2_xs() -> CodebookFormat:
    """Every eight values: nine bits of index, seven signs."""
    low = _bytes([2 + 2 * k for k in range(32)])
    high = Fields.of(8, 1, [(3 + 2 * k, 0) for k in range(32)])
    return CodebookFormat((low, high), (Fields.of(0, 7, [(3 + 2 * k, 1) for k in range(32)]),), 8, 16)


def _iq2_s() -> CodebookFormat:
    """Low bytes of all indices, all signs, two high bits of every index."""
    high = Fields.of(8, 2, [(66 + k // 4, k % 4 * 2) for k in range(32)])
    return CodebookFormat((_bytes(range(2, 34)), high), (_bytes(range(34, 66)),), 8, 16)


def _iq3_xxs() -> CodebookFormat:
    """All indices, then for every 32 values four times seven signs and a scale of four bits."""
    signs = bit_planes(0, 7, [(66 + k // 4 * 4) * 8 + k % 4 * 7 for k in range(32)])
    return CodebookFormat((_bytes(range(2, 66)),), signs, 4, 32)


def _iq3_s() -> CodebookFormat:
    """Low bytes of all indices, a high bit of every index, all signs."""
    high = Fields.of(8, 1, [(66 + k // 8, k % 8) for k in range(64)])
    return CodebookFormat((_bytes(range(2, 66)), high), (_bytes(range(74, 106)),), 4, 32)


CODEBOOK_FORMATS: Mapping[GGMLQuantizationType, CodebookFormat] = {
    _T.IQ2_XXS: _iq2_xxs(),
    _T.IQ2_XS: _iq2_xs(),
    _T.IQ2_S: _iq2_s(),
    _T.IQ3_XXS: _iq3_xxs(),
    _T.IQ3_S: _iq3_s(),
}


@functools.cache
def table_of(ggml_type: GGMLQuantizationType) -> VectorTable:
    """All vectors of the type, in units of the first entry of the first one, the smallest."""
    form = CODEBOOK_FORMATS[ggml_type]
    per_block = _BLOCK_LENGTH // form.vector_length
    n_vectors = 1 << sum(run.width for run in form.index)
    blocks_1KY = np.zeros((1, n_vectors // per_block, BLOCK_SIZES[ggml_type][1]), dtype=np.uint8)
    blocks_1KY[..., :2] = _ONE
    write_codes(blocks_1KY, form.index, np.arange(n_vectors, dtype=np.uint16).reshape(1, -1, per_block))
    n_values = n_vectors * form.vector_length
    entries = dequantize_rows(blocks_1KY.reshape(1, -1), ggml_type, n_values).reshape(n_vectors, -1)
    return VectorTable(torch.from_numpy(entries / entries[0, 0]), form.even_signs)


def grid_of(quantized_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType, order_N: torch.Tensor) -> VectorGrid:
    """The values that rows can take under the scales in ``quantized_RY``; groups of eight in the given order."""
    form = CODEBOOK_FORMATS[ggml_type]
    blocks_RKY = copied_blocks(quantized_RY, ggml_type)
    write_codes(blocks_RKY, form.index, np.zeros((1, 1, 1), dtype=np.uint16))
    write_codes(blocks_RKY, form.signs, np.zeros((1, 1, 1), dtype=np.uint16))
    first_RN = dequantize_rows(blocks_RKY.reshape(quantized_RY.shape), ggml_type, blocks_RKY.shape[1] * _BLOCK_LENGTH)
    scale_SR = torch.from_numpy(np.ascontiguousarray(first_RN[:, :: form.scale_length].T))
    return VectorGrid(table_of(ggml_type), scale_SR, order_N[::SIGN_LENGTH] // form.scale_length)


def with_codes(
    quantized_RY: npt.NDArray[np.uint8],
    ggml_type: GGMLQuantizationType,
    index_GVR: npt.NDArray[np.uint16],
    signs_GR: npt.NDArray[np.uint8],
) -> npt.NDArray[np.uint8]:
    """The rows with other codes, in the order of the row; bit i of the signs says that value i of eight is negative."""
    form = CODEBOOK_FORMATS[ggml_type]
    blocks_RKY = copied_blocks(quantized_RY, ggml_type)
    n_rows, n_blocks, _ = blocks_RKY.shape
    write_codes(blocks_RKY, form.index, index_GVR.reshape(-1, n_rows).T.reshape(n_rows, n_blocks, -1))
    write_codes(blocks_RKY, form.signs, signs_GR.T.reshape(n_rows, n_blocks, -1))
    return blocks_RKY.reshape(quantized_RY.shape)
