"""ONNX Runtime's blocks of 2, 4 or 8 bit codes with scales, and zero points where the operator takes them.

value = (code - zero point) x scale; without zero points of its own a block has 2^(bits - 1)
(``docs/ContribOperators.md``: MatMulNBits, QMoE, GatherBlockQuantized). Codes are returned unpacked.

Letters: R rows, N values of a row, K blocks of a row, B values of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.errors import InputError
from compressors.quantize.feedback.levels import LevelGrid, Levels
from compressors.quantize.feedback.moments import Feedback
from compressors.quantize.feedback.one_thread import one_thread
from compressors.quantize.feedback.passes import choose_codes, improve_codes, n_sweeps_for
from compressors.quantize.feedback.scale_fit import float16, refit_scales
from compressors.quantize.feedback.scale_search import search_ranges, search_scales

__all__ = ["IntegerBlocks", "quantize_blocks_with_feedback"]

_SLICE_ROWS = 1024
"""Rows that are rounded together: a column of them fits a core's first cache."""


@dataclass(frozen=True)
class IntegerBlocks:
    """A matrix in blocks of integer codes."""

    codes_RN: npt.NDArray[np.uint8]
    scales_RK: npt.NDArray[np.float32]
    zero_points_RK: npt.NDArray[np.uint8] | None  # None: 2^(bits - 1)
    bits: int

    def values(self) -> npt.NDArray[np.float32]:
        """The numbers, float32 [R, N]."""
        n_rows, n_blocks = self.scales_RK.shape
        if self.zero_points_RK is None:
            zero_points_RK = np.full_like(self.scales_RK, 2 ** (self.bits - 1))
        else:
            zero_points_RK = self.zero_points_RK.astype(np.float32)
        codes_RKB = self.codes_RN.reshape(n_rows, n_blocks, -1).astype(np.float32)
        values_RKB: npt.NDArray[np.float32] = (codes_RKB - zero_points_RK[..., None]) * self.scales_RK[..., None]
        return values_RKB.reshape(n_rows, -1)


@one_thread()
def quantize_blocks_with_feedback(
    values_RN: torch.Tensor,
    bits: int,
    block_size: int,
    feedback: Feedback | None,
    importance_N: torch.Tensor | None,
    *,
    with_zero_points: bool = False,
    name: str = "weights",
) -> IntegerBlocks:
    """Quantizes rows of float32, bfloat16 or float16 values to blocks of ``bits`` bits; ``block_size`` divides a row.

    Scales, which are values of float16, are searched with the squared errors weighted by ``importance_N`` (all alike if
    None or zero everywhere). Codes are chosen so that the error of the outputs is small over the inputs that
    ``feedback`` tells of; without it they are the nearest.

    Raises:
        InputError: a value is not finite; the message calls the weights ``name``.
    """
    n_rows, row_length = values_RN.shape
    assert row_length % block_size == 0, f"{name}: rows of {row_length} values in blocks of {block_size}"
    values_RN = values_RN.float()
    if not bool(torch.isfinite(values_RN).all()):
        raise InputError(f"{name}: NaN and infinity cannot be written")
    zeros_RK: npt.NDArray[np.uint8] | None = None
    if with_zero_points:
        scales_RK, zeros_RK = search_ranges(values_RN.numpy(), importance_N, block_size, 2**bits - 1)
    else:
        lowest = -(2 ** (bits - 1))
        scales_RK = search_scales(values_RN.numpy(), importance_N, block_size, lowest, -lowest - 1)
    scales_RK = float16(scales_RK)  # as files keep them
    codes_RN = np.empty((n_rows, row_length), dtype=np.uint8)
    for first in range(0, n_rows, _SLICE_ROWS):
        rows = slice(first, first + _SLICE_ROWS)
        zeros = None if zeros_RK is None else zeros_RK[rows]
        codes_RN[rows], scales_RK[rows] = _choose(values_RN[rows], bits, scales_RK[rows], zeros, feedback)
    return IntegerBlocks(codes_RN, scales_RK, zeros_RK, bits)


def _choose(
    values_RN: torch.Tensor,
    bits: int,
    scales_RK: npt.NDArray[np.float32],
    zero_points_RK: npt.NDArray[np.uint8] | None,
    feedback: Feedback | None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """The codes, and the scales fitted to them."""
    block_size = values_RN.shape[1] // scales_RK.shape[1]
    order_N = torch.arange(values_RN.shape[1]) if feedback is None else feedback.order_N(1)
    lowest = 0 if zero_points_RK is not None else -(2 ** (bits - 1))
    grid = LevelGrid(
        Levels.uniform(lowest, lowest + 2**bits - 1),
        np.ascontiguousarray(scales_RK.T),
        order_N.numpy() // block_size,
        zero_SR=None if zero_points_RK is None else zero_points_RK.T.astype(np.float32),
    )
    ordered_NR = values_RN.T[order_N].contiguous()
    if feedback is None:
        for column in range(len(ordered_NR)):
            grid.round_group(column, ordered_NR[column : column + 1], torch.ones(1, 1), None)
    else:
        errors_NR = choose_codes(ordered_NR, grid, feedback, n_sweeps_for(bits))
        refit_scales(grid, errors_NR, feedback, float16)
        improve_codes(ordered_NR, errors_NR, grid, feedback, 1)
    codes_NR = np.empty(ordered_NR.shape, dtype=np.uint8)
    codes_NR[order_N.numpy()] = grid.codes_NR()
    return codes_NR.T, grid.scale_SR.T
