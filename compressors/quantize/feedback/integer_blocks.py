"""ONNX Runtime's blocks of 2, 4 or 8 bits: searched scales, codes that feed errors back, scales fitted to the codes.

Letters: R rows, N values of a row, K blocks of a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.files.integer_blocks import IntegerBlocks
from compressors.quantize.blocks import search_blocks
from compressors.quantize.feedback.levels import LevelGrid, Levels
from compressors.quantize.feedback.moments import Feedback
from compressors.quantize.feedback.one_thread import one_thread
from compressors.quantize.feedback.passes import SLICE_ROWS, choose_codes, improve_codes, n_sweeps_for, ordered_columns
from compressors.quantize.feedback.scale_fit import refit_scales

__all__ = ["quantize_blocks_with_feedback"]


@one_thread()
def quantize_blocks_with_feedback(
    values_RN: torch.Tensor,
    bits: int,
    block_size: int,
    feedback: Feedback,
    importance_N: torch.Tensor | None = None,
    *,
    name: str,
) -> IntegerBlocks:
    """Quantizes rows of float32, bfloat16 or float16 values to blocks of ``bits`` bits.

    Scales start from :func:`~compressors.quantize.blocks.search_blocks`. The codes are chosen again, so that the error
    of the outputs is small for the inputs that ``feedback`` describes; then the scales are fitted to the codes.
    The result does not depend on threads; a matrix has to come in the same calls each time, as in
    :func:`~compressors.quantize.feedback.rows.quantize_rows_with_feedback`.

    Raises:
        InputError: a value is not finite, or the importance is invalid; the message calls the weights ``name``.
    """
    searched = search_blocks(values_RN, bits, block_size, importance_N, name=name)
    codes_RN, scales_RK = searched.codes_RN, searched.scales_RK
    for first in range(0, len(values_RN), SLICE_ROWS):
        rows = slice(first, first + SLICE_ROWS)
        codes_RN[rows], scales_RK[rows] = _chosen(values_RN[rows], scales_RK[rows], bits, feedback)
    return IntegerBlocks(codes_RN, scales_RK, bits)


def _chosen(
    values_RN: torch.Tensor, scales_RK: npt.NDArray[np.float32], bits: int, feedback: Feedback
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """The codes, and the scales fitted to them."""
    order_N = feedback.order_N(1)
    scale_of_N = order_N.numpy() // (values_RN.shape[1] // scales_RK.shape[1])
    lowest = -(2 ** (bits - 1))
    grid = LevelGrid(Levels.uniform(lowest, -lowest - 1), np.ascontiguousarray(scales_RK.T), scale_of_N)
    ordered_NR = ordered_columns(values_RN, order_N)
    errors_NR = choose_codes(ordered_NR, grid, feedback, n_sweeps_for(bits))
    refit_scales(grid, errors_NR, feedback)
    improve_codes(ordered_NR, errors_NR, grid, feedback, 1)
    codes_NR = np.empty(ordered_NR.shape, dtype=np.uint8)
    codes_NR[order_N.numpy()] = grid.codes_NR()
    return codes_NR.T, grid.scale_SR.T
