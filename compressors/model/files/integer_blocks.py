"""Integer codes of 2, 4 or 8 bits with one scale per block: the search for the scales, and the codes under them.

ONNX Runtime computes a weight as (code - zero point) * scale, with blocks of any power of two from 16 and the zero
point in the middle (``docs/ContribOperators.md``: MatMulNBits, QMoE, GatherBlockQuantized). No kernel of ggml searches
scales for such blocks. The search is that of ggml's ``make_qx_quants`` (``ggml/src/ggml-quants.c``): the value
furthest from zero is laid on various levels, codes are rounded, and the scale is the least squares solution for
them; the best scale then takes turns with its codes (Lloyd's algorithm). Scales of either sign are tried, because the
codes reach one level further down than up.

Letters: R rows, N values of a row, K blocks of a row, B values of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["BITS", "BlockType", "IntegerBlocks", "ProductInputs", "float16_values", "round_to_codes", "search_blocks"]

ProductInputs = Literal["int8", "float32"]
"""The form of the values that a runtime multiplies blocks with; int8 has a scale for as many values as a block has."""

BITS = (2, 4, 8)

_LEVELS = {
    2: (0.9, 1.05, 1.2, 1.35, 1.5, 1.7, 1.9, 2.1),
    4: (0.89, 0.94, 0.97, 1.0, 1.04, 1.09, 1.15, 1.22, 1.4),
    8: (0.98, 0.99, 0.995, 1.0),
}
"""Levels for the value furthest from zero, in units of the lowest level, 2^(bits - 1); beyond 1 it is cut off."""

_TURNS = 2  # rounds of codes and scale; a third lowers the error by less than 1 %
_VALUES_AT_ONCE = 1 << 16  # a quarter of a megabyte of float32: a core's cache holds the search's arrays

_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockType:
    """A way of storing rows of values."""

    bits: int
    block_size: int

    @property
    def name(self) -> str:
        """Bits and block size, such as ``4@128``."""
        return f"{self.bits}@{self.block_size}"


@dataclass(frozen=True)
class IntegerBlocks:
    """Rows in blocks; value = (code - 2^(bits - 1)) * scale."""

    codes_RN: npt.NDArray[np.uint8]  # one code a byte
    scales_RK: _Floats  # each is a float16's value
    bits: int

    def values(self) -> _Floats:
        """Returns the numbers, float32 [R, N]; a code times a scale is rounded once."""
        n_rows, n_blocks = self.scales_RK.shape
        signed_RKB = self.codes_RN.reshape(n_rows, n_blocks, -1).astype(np.float32) - np.float32(_lowest(self.bits))
        values_RKB: _Floats = signed_RKB * self.scales_RK[..., None]
        return values_RKB.reshape(n_rows, -1)


def search_blocks(
    values_RN: _Floats, bits: int, block_size: int, importance_N: npt.NDArray[np.float32] | None = None
) -> IntegerBlocks:
    """Finds each block's scale, and codes, with a small sum of importance times squared error.

    Scales are rounded to float16 before the codes are. A row's result does not depend on the other rows.

    Args:
        values_RN: finite float32; N is a multiple of the block size.
        bits: the bits of a code: 2, 4 or 8.
        block_size: values of a block.
        importance_N: weighs the squared error of each input feature; all count alike with None, and in a block whose
            weights are all zero.
    """
    n_rows, row_length = values_RN.shape
    weights_KB = _block_weights(importance_N, row_length, block_size)
    scales_RK = np.empty((n_rows, row_length // block_size), np.float32)
    codes_RN = np.empty((n_rows, row_length), np.uint8)
    rows_at_once = max(1, _VALUES_AT_ONCE // row_length)
    for first in range(0, n_rows, rows_at_once):
        rows = slice(first, first + rows_at_once)
        values_RKB = values_RN[rows].reshape(-1, *weights_KB.shape)
        scales_RK[rows] = _Search(values_RKB, weights_KB, bits).scales()
        codes_RN[rows] = round_to_codes(values_RN[rows], scales_RK[rows], bits)
    return IntegerBlocks(codes_RN, scales_RK, bits)


def round_to_codes(values_RN: _Floats, scales_RK: _Floats, bits: int) -> npt.NDArray[np.uint8]:
    """The code nearest to each value under its block's scale, one a byte; a scale of zero gives the zero point."""
    n_rows, n_blocks = scales_RK.shape
    signed_RKB = _signed_codes(values_RN.reshape(n_rows, n_blocks, -1), _inverse(scales_RK), bits)
    codes: npt.NDArray[np.uint8] = (signed_RKB + np.float32(_lowest(bits))).astype(np.uint8).reshape(n_rows, -1)
    return codes


def _block_weights(importance_N: npt.NDArray[np.float32] | None, row_length: int, block_size: int) -> _Floats:
    if importance_N is None:
        return np.ones((row_length // block_size, block_size), np.float32)
    weights_KB = importance_N.astype(np.float32).reshape(-1, block_size)
    largest_K1 = weights_KB.max(axis=1, keepdims=True)
    # scaled, so that no sum overflows or vanishes; the search within a block does not see it
    scaled_KB: _Floats = np.where(largest_K1 > 0, weights_KB / np.where(largest_K1 > 0, largest_K1, 1), 1)
    return scaled_KB


class _Search:
    """The scales of some rows' blocks."""

    def __init__(self, values_RKB: _Floats, weights_KB: _Floats, bits: int) -> None:
        self._values = values_RKB
        self._weights = weights_KB
        self._weighted = values_RKB * weights_KB
        self._bits = bits
        self._best_RK = np.zeros(values_RKB.shape[:2], np.float32)
        self._gain_RK = np.zeros_like(self._best_RK)

    def scales(self) -> _Floats:
        furthest_RK = self._furthest()
        signs = (1, -1) if self._bits < _LARGEST_BITS else (1,)
        for level in _LEVELS[self._bits]:
            for sign in signs:
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                    self._try(_inverse(furthest_RK / np.float32(-sign * level * _lowest(self._bits))))
        for _ in range(_TURNS):
            self._try(_inverse(self._best_RK))
        return float16_values(self._best_RK)

    def _furthest(self) -> _Floats:
        """The value furthest from zero of each block, with its sign."""
        place_RK = np.abs(self._values).argmax(axis=-1)
        furthest: _Floats = np.take_along_axis(self._values, place_RK[..., None], axis=-1)[..., 0]
        return furthest

    def _try(self, inverse_RK: _Floats) -> None:
        """Keeps the least squares scale for the codes under a scale, where it leaves less error than the best so far.

        The error that the best scale for codes q leaves is sum(w x^2) - (sum(w x q))^2 / sum(w q^2).
        """
        codes_RKB = _signed_codes(self._values, inverse_RK, self._bits)
        products_RK = np.einsum("rkb,rkb->rk", self._weighted, codes_RKB)
        squares_RK = np.einsum("rkb,kb->rk", np.square(codes_RKB, out=codes_RKB), self._weights)
        is_used_RK = squares_RK > 0
        scale_RK = np.divide(products_RK, squares_RK, out=np.zeros_like(products_RK), where=is_used_RK)
        gain_RK = products_RK * scale_RK
        is_better_RK = gain_RK > self._gain_RK
        np.copyto(self._best_RK, scale_RK, where=is_better_RK)
        np.copyto(self._gain_RK, gain_RK, where=is_better_RK)


_LARGEST_BITS = max(BITS)


def _lowest(bits: int) -> int:
    """The number of levels below zero; there is one less above."""
    return 1 << (bits - 1)


def _signed_codes(values_RKB: _Floats, inverse_RK: _Floats, bits: int) -> _Floats:
    codes_RKB = values_RKB * inverse_RK[..., None]
    np.rint(codes_RKB, out=codes_RKB)
    return np.clip(codes_RKB, -_lowest(bits), _lowest(bits) - 1, out=codes_RKB)


def _inverse(scales_RK: _Floats) -> _Floats:
    """1 / scale; 0 for a scale of 0."""
    return np.divide(np.float32(1), scales_RK, out=np.zeros_like(scales_RK), where=scales_RK != 0)


def float16_values(numbers: _Floats) -> _Floats:
    """Returns the nearest numbers that float16 represents."""
    with np.errstate(over="ignore"):
        return numbers.astype(np.float16).astype(np.float32)
