"""Scales fitted to codes that have been chosen, by least squares under the second moments of the inputs.

Letters: N columns in the order of the couplings, R rows, S groups of columns with one scale, B columns of a group.
"""

from __future__ import annotations

import numpy as np
import torch

from compressors.model.files.integer_blocks import float16_values
from compressors.quantize.feedback.levels import LevelGrid
from compressors.quantize.feedback.moments import Feedback

__all__ = ["refit_scales"]


def refit_scales(grid: LevelGrid, errors_NR: torch.Tensor, feedback: Feedback) -> None:
    """Gives every scale in turn the value with the least error of the outputs, while codes stay fixed.

    With the levels c and the errors e, a change of d leaves (e - d c) H (e - d c)^T: d = c H e / c H c.
    Scales are rounded to float16; a change that then no longer helps is not made.
    The grid gets the scales, and ``errors_NR`` are updated.
    """
    moments_NN = feedback.ordered_NN(1)
    levels_NR = torch.from_numpy(grid.levels_NR())
    scale_SR = grid.scale_SR.copy()
    for group in range(len(scale_SR)):
        columns_B = torch.from_numpy(np.flatnonzero(grid.scale_of_N == group))
        rows_BN, levels_BR = moments_NN[columns_B], levels_NR[columns_B]
        slope_R = (levels_BR * (rows_BN @ errors_NR)).sum(dim=0)
        curvature_R = (levels_BR * (rows_BN[:, columns_B] @ levels_BR)).sum(dim=0)
        wanted_R = torch.where(curvature_R > 0, slope_R / curvature_R, 0.0).numpy()
        new_R = float16_values(scale_SR[group] + wanted_R)
        change_R = torch.from_numpy(new_R - scale_SR[group])
        change_R[~(change_R * (2 * slope_R - change_R * curvature_R) > 0)] = 0
        scale_SR[group] = np.where(change_R.numpy() == 0, scale_SR[group], new_R)
        errors_NR[columns_B] -= change_R * levels_BR
    grid.rescale(scale_SR)
