"""Formats that store a code for every value: value = level of the code x scale + offset.

This module states only the places of the codes (``ggml/src/ggml-common.h``, ``dequantize_row_*`` in
``ggml/src/ggml-quants.c``). Levels, scales and offsets are read with ggml from blocks whose codes are all the same.

Letters: R rows, N values of a row, K blocks of a row, Y bytes of a block or row, S groups of values with one scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.files.gguf.ggml import dequantize_rows
from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType
from compressors.quantize.feedback.fields import Fields, copied_blocks, write_codes
from compressors.quantize.feedback.levels import LevelGrid, Levels
from compressors.quantize.kernels import quantize_rows

__all__ = ["SCALAR_FORMATS", "ScalarFormat", "grid_of", "levels_of", "with_codes", "with_scales"]

_T = GGMLQuantizationType


@dataclass(frozen=True)
class ScalarFormat:
    """The codes of one type."""

    fields: tuple[Fields, ...]
    scale_length: int  # the number of neighbouring values that share scale and offset
    unit_code: int  # the code whose level is 1
    minimum: slice | None = None  # the bytes of the float16 factor of all offsets
    lowest_level: int | None = None  # set if not every code is used; Q8_0: no kernel writes -128
    fitted_scale: bool = False  # the scale is a float16 at the start of the block, and is fitted to the codes

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(run.width for run in self.fields)


def _fields(low: int, width: int, n_codes: int, place: Callable[[int], tuple[int, int]]) -> Fields:
    return Fields.of(low, width, map(place, range(n_codes)))


def _nibbles_32(first_byte: int) -> Fields:
    """Blocks of 32 codes: the first 16 in the low halves of 16 bytes, the others in the high halves."""
    return _fields(0, 4, 32, lambda e: (first_byte + e % 16, e // 16 * 4))


def _nibbles_64(first_byte: int) -> Fields:
    """Q4_K and Q5_K: 64 codes in 32 bytes, low halves first."""
    return _fields(0, 4, 256, lambda e: (first_byte + e // 64 * 32 + e % 32, e % 64 // 32 * 4))


def _pairs_128(low: int, first_byte: int) -> Fields:
    """Two bits of 128 codes in 32 bytes; codes 32 apart share a byte."""
    return _fields(low, 2, 256, lambda e: (first_byte + e // 128 * 32 + e % 32, e % 128 // 32 * 2))


def _bits_256(low: int, first_byte: int) -> Fields:
    """One bit of 256 codes in 32 bytes; codes 32 apart share a byte."""
    return _fields(low, 1, 256, lambda e: (first_byte + e % 32, e // 32))


def _bits_32(low: int, first_byte: int) -> Fields:
    """One bit of 32 codes in 4 bytes."""
    return _fields(low, 1, 32, lambda e: (first_byte + e // 8, e % 8))


SCALAR_FORMATS: Mapping[GGMLQuantizationType, ScalarFormat] = {
    _T.Q8_0: ScalarFormat((_fields(0, 8, 32, lambda e: (2 + e, 0)),), 32, 1, lowest_level=-127),
    _T.Q2_0: ScalarFormat((_fields(0, 2, 64, lambda e: (2 + e // 4, e % 4 * 2)),), 64, 2, fitted_scale=True),
    _T.Q4_0: ScalarFormat((_nibbles_32(2),), 32, 9, fitted_scale=True),
    _T.Q4_1: ScalarFormat((_nibbles_32(4),), 32, 1, slice(2, 4)),
    _T.Q5_0: ScalarFormat((_nibbles_32(6), _bits_32(4, 2)), 32, 17, fitted_scale=True),
    _T.Q5_1: ScalarFormat((_nibbles_32(8), _bits_32(4, 4)), 32, 1, slice(2, 4)),
    _T.IQ4_NL: ScalarFormat((_nibbles_32(2),), 32, 8, fitted_scale=True),
    _T.MXFP4: ScalarFormat((_nibbles_32(1),), 32, 1),
    _T.Q2_K: ScalarFormat((_pairs_128(0, 16),), 16, 1, slice(82, 84)),
    _T.Q3_K: ScalarFormat((_pairs_128(0, 32), _bits_256(2, 0)), 16, 5),
    _T.Q4_K: ScalarFormat((_nibbles_64(16),), 32, 1, slice(2, 4)),
    _T.Q5_K: ScalarFormat((_nibbles_64(48), _bits_256(4, 16)), 32, 1, slice(2, 4)),
    _T.Q6_K: ScalarFormat(
        (_fields(0, 4, 256, lambda e: (e // 128 * 64 + e % 64, e % 128 // 64 * 4)), _pairs_128(4, 128)), 16, 33
    ),
    _T.IQ4_XS: ScalarFormat((_fields(0, 4, 256, lambda e: (8 + e // 32 * 16 + e % 16, e % 32 // 16 * 4)),), 32, 8),
}


@functools.cache
def levels_of(ggml_type: GGMLQuantizationType) -> Levels:
    """The level of every code, read from a block that the library made."""
    form = SCALAR_FORMATS[ggml_type]
    block_length, _ = BLOCK_SIZES[ggml_type]
    ramp_1N = torch.linspace(-1, 1, block_length)[None]
    quantized_1Y = quantize_rows(ramp_1N, ggml_type, torch.ones(block_length), name="ramp")
    unit = _read_with(quantized_1Y, ggml_type, form.unit_code, without_minimum=True)[0, 0]
    n_codes = 1 << form.bits
    read = [_read_with(quantized_1Y, ggml_type, code, without_minimum=True)[0, 0] for code in range(n_codes)]
    return Levels.of(np.rint(np.array(read) / unit), form.lowest_level)


def grid_of(quantized_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType, order_N: torch.Tensor) -> LevelGrid:
    """The values that rows can take under the scales and offsets in ``quantized_RY``."""
    form = SCALAR_FORMATS[ggml_type]

    def read(code: int, *, without_minimum: bool) -> npt.NDArray[np.float32]:
        values_RN = _read_with(quantized_RY, ggml_type, code, without_minimum=without_minimum)
        return np.ascontiguousarray(values_RN[:, :: form.scale_length].T)

    scale_SR = read(form.unit_code, without_minimum=True)
    offset_SR = None if form.minimum is None else read(0, without_minimum=False)
    return LevelGrid(levels_of(ggml_type), scale_SR, order_N.numpy() // form.scale_length, offset_SR)


def with_codes(
    quantized_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType, codes_RN: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """The rows with other codes, uint8 [R, N] in the order of the row."""
    blocks_RKY = copied_blocks(quantized_RY, ggml_type)
    write_codes(blocks_RKY, SCALAR_FORMATS[ggml_type].fields, codes_RN.reshape(*blocks_RKY.shape[:2], -1))
    return blocks_RKY.reshape(quantized_RY.shape)


def with_scales(
    quantized_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType, scale_SR: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """The rows with other scales, which float16 can represent."""
    assert SCALAR_FORMATS[ggml_type].fitted_scale, ggml_type.name
    blocks_RKY = copied_blocks(quantized_RY, ggml_type)
    blocks_RKY[..., :2] = np.ascontiguousarray(scale_SR.T.astype(np.float16)[..., None]).view(np.uint8)
    return blocks_RKY.reshape(quantized_RY.shape)


def _read_with(
    quantized_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType, code: int, *, without_minimum: bool
) -> npt.NDArray[np.float32]:
    """The values that ggml reads from the rows if all their codes are ``code``: [R, N]."""
    form = SCALAR_FORMATS[ggml_type]
    blocks_RKY = copied_blocks(quantized_RY, ggml_type)
    write_codes(blocks_RKY, form.fields, np.full((1, 1, 1), code, dtype=np.uint8))
    if form.minimum is not None and without_minimum:
        blocks_RKY[..., form.minimum] = 0
    row_length = blocks_RKY.shape[1] * BLOCK_SIZES[ggml_type][0]
    return dequantize_rows(blocks_RKY.reshape(quantized_RY.shape), ggml_type, row_length)
