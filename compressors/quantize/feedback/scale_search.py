"""Scales of blocks of integer codes, found by trying: for formats that ggml has no good kernel for, or none.

A scale is tried, the block rounded by it, and the scale fitted again to the codes by weighted least squares; the best
of all tries wins. This is ``make_qx_quants`` of ``ggml/src/ggml-quants.c`` with scales of either sign, since
the levels of b bits, -2^(b-1) to 2^(b-1) - 1, reach further to one side.

Letters: R rows, K blocks of a row, B values of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["search_ranges", "search_scales"]

_Floats = npt.NDArray[np.float32]

_EXCESSES = np.arange(-0.8, 1.9, 0.2, dtype=np.float32)
"""Where a try puts a block's extreme value, in levels beyond the furthest one: above 0 it is cut off."""

_SLICE_VALUES = 1 << 16  # values that are tried together: they stay in a core's cache


def search_scales(
    values_RN: _Floats, importance_N: torch.Tensor | None, block_length: int, lowest: int, highest: int
) -> _Floats:
    """The scales [R, K] with a small squared error of rounding to ``scale x (lowest .. highest)``.

    The squares are weighted by ``importance_N``; all alike if it is None, or zero everywhere.
    """
    values_RKB, weights_KB = _in_blocks(values_RN, importance_N, block_length)
    scales_RK = np.empty(values_RKB.shape[:2], dtype=np.float32)
    for rows in _slices(values_RKB):
        scales_RK[rows] = _search_scales(values_RKB[rows], weights_KB, lowest, highest)
    return scales_RK


def search_ranges(
    values_RN: _Floats, importance_N: torch.Tensor | None, block_length: int, highest: int
) -> tuple[_Floats, npt.NDArray[np.uint8]]:
    """Scales and zero points [R, K]: as :func:`search_scales`, for ``scale x (0 .. highest - zero point)``."""
    values_RKB, weights_KB = _in_blocks(values_RN, importance_N, block_length)
    scales_RK = np.empty(values_RKB.shape[:2], dtype=np.float32)
    zero_points_RK = np.empty(values_RKB.shape[:2], dtype=np.uint8)
    for rows in _slices(values_RKB):
        scales_RK[rows], zero_points_RK[rows] = _search_ranges(values_RKB[rows], weights_KB, highest)
    return scales_RK, zero_points_RK


def _in_blocks(values_RN: _Floats, importance_N: torch.Tensor | None, block_length: int) -> tuple[_Floats, _Floats]:
    n_rows, row_length = values_RN.shape
    if importance_N is None or not bool(importance_N.any()):
        weights_N = np.ones(row_length, dtype=np.float32)
    else:
        weights_N = importance_N.float().numpy()
    return values_RN.reshape(n_rows, -1, block_length), weights_N.reshape(-1, block_length)


def _slices(values_RKB: _Floats) -> Iterator[slice]:
    n_rows = max(1, _SLICE_VALUES // values_RKB[0].size)
    for first in range(0, len(values_RKB), n_rows):
        yield slice(first, first + n_rows)


def _search_scales(values_RKB: _Floats, weights_KB: _Floats, lowest: int, highest: int) -> _Floats:
    at_RK1 = np.abs(values_RKB).argmax(axis=-1)[..., None]
    extreme_RK = np.take_along_axis(values_RKB, at_RK1, axis=-1)[..., 0]
    fit = _Fit(values_RKB, weights_KB)
    furthest = np.float32(max(-lowest, highest))
    for sign in (np.float32(-1), np.float32(1)):
        for excess in _EXCESSES:
            fit.try_scales(sign * extreme_RK / (furthest + excess), np.float32(lowest), np.float32(highest))
    return fit.scales_RK


def _search_ranges(values_RKB: _Floats, weights_KB: _Floats, highest: int) -> tuple[_Floats, npt.NDArray[np.uint8]]:
    least_RK, greatest_RK = values_RKB.min(axis=-1), values_RKB.max(axis=-1)
    fit = _Fit(values_RKB, weights_KB)
    zero_points_RK = np.zeros_like(least_RK)
    for excess in _EXCESSES:
        tried_RK = (greatest_RK - least_RK) / (np.float32(highest) + excess)
        middle_RK = (least_RK + greatest_RK) / 2 * _inverse(tried_RK)
        for rounded in (np.floor, np.ceil):
            zero_RK = np.clip(rounded(np.float32(highest / 2) - middle_RK), 0, highest).astype(np.float32)
            better_RK = fit.try_scales(tried_RK, -zero_RK[..., None], highest - zero_RK[..., None])
            zero_points_RK = np.where(better_RK, zero_RK, zero_points_RK)
    return fit.scales_RK, zero_points_RK.astype(np.uint8)


class _Fit:
    """The best scales tried so far: those that take most of the weighted squares of the values away."""

    def __init__(self, values_RKB: _Floats, weights_KB: _Floats) -> None:
        self._values_RKB, self._weights_KB = values_RKB, weights_KB
        self._weighted_RKB = values_RKB * weights_KB
        self.scales_RK = np.zeros(values_RKB.shape[:2], dtype=np.float32)
        self._gain_RK = np.zeros_like(self.scales_RK)

    def try_scales(
        self, tried_RK: _Floats, lowest: _Floats | np.float32, highest: _Floats | np.float32
    ) -> npt.NDArray[np.bool_]:
        """Rounds by the tried scales, fits scales to the codes, and says where these are better than all before."""
        levels_RKB = self._values_RKB * _inverse(tried_RK)[..., None]
        np.rint(levels_RKB, out=levels_RKB)
        np.fmax(levels_RKB, lowest, out=levels_RKB)
        np.fmin(levels_RKB, highest, out=levels_RKB)
        product_RK = np.einsum("rkb,rkb->rk", levels_RKB, self._weighted_RKB)
        square_RK = np.einsum("rkb,rkb,kb->rk", levels_RKB, levels_RKB, self._weights_KB)
        fitted_RK = product_RK * _inverse(square_RK)
        gain_RK = product_RK * fitted_RK
        better_RK: npt.NDArray[np.bool_] = gain_RK > self._gain_RK
        self.scales_RK = np.where(better_RK, fitted_RK, self.scales_RK)
        self._gain_RK = np.where(better_RK, gain_RK, self._gain_RK)
        return better_RK


def _inverse(numbers: _Floats) -> _Floats:
    """1 / x, and 0 for 0."""
    with np.errstate(divide="ignore"):
        return np.where(numbers == 0, np.float32(0), 1 / numbers).astype(np.float32)
