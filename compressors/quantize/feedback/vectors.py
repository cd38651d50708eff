"""Values on a table of vectors with signs: eight columns of all rows are rounded at a time.

Letters: R rows, L = 8 columns of a group, V vectors of a group (one of eight values or two of four), T vectors of the
table, E entries of a vector, S groups of columns with one scale, G groups of eight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["SIGN_LENGTH", "VectorGrid", "VectorTable"]

SIGN_LENGTH = 8
"""Values whose signs are stored together."""

_SEARCHED_ROWS = 256
"""Rows whose costs of all vectors are held at a time: 1 MB, which a core's second cache holds."""


@dataclass(frozen=True)
class VectorTable:
    """The vectors of magnitudes, and whether the number of minus signs in a group has to be even."""

    entries_TE: torch.Tensor
    even_signs: bool


class VectorGrid:
    """The values of a matrix's columns, and the codes chosen so far; groups in the order of the couplings."""

    length = SIGN_LENGTH

    def __init__(self, table: VectorTable, scale_SR: torch.Tensor, scale_of_G: torch.Tensor) -> None:
        self._table = table
        self._scale_SR, self._scale_of_G = scale_SR, scale_of_G.tolist()
        self._inverse_SR = torch.where(scale_SR == 0, 0.0, 1 / scale_SR)
        n_groups, n_rows = len(scale_of_G), scale_SR.shape[1]
        self.index_GVR = torch.zeros(n_groups, SIGN_LENGTH // table.entries_TE.shape[1], n_rows, dtype=torch.int64)
        self.negative_GLR = torch.zeros(n_groups, SIGN_LENGTH, n_rows, dtype=torch.bool)

    def round_group(
        self, group: int, targets_LR: torch.Tensor, metric_LL: torch.Tensor, current_LR: torch.Tensor | None
    ) -> torch.Tensor:
        """Finds the nearest vectors by the metric's diagonal; they replace the current ones where the metric agrees."""
        weight_L = metric_LL.diagonal()
        scale_R = self._scale_SR[self._scale_of_G[group]]
        scaled_LR = targets_LR * self._inverse_SR[self._scale_of_G[group]]
        negative_LR = self._signs(scaled_LR, weight_L)
        magnitude_LR = torch.where(negative_LR, -scaled_LR, scaled_LR)
        index_VR = self._nearest(magnitude_LR, weight_L)
        values_LR = self._values(index_VR, negative_LR) * scale_R
        if current_LR is not None:
            better_R = _cost(values_LR - targets_LR, metric_LL) < _cost(current_LR - targets_LR, metric_LL)
            values_LR = torch.where(better_R, values_LR, current_LR)
            index_VR = torch.where(better_R, index_VR, self.index_GVR[group])
            negative_LR = torch.where(better_R, negative_LR, self.negative_GLR[group])
        self.index_GVR[group], self.negative_GLR[group] = index_VR, negative_LR
        return values_LR

    def signs_GR(self) -> npt.NDArray[np.uint8]:
        """The chosen signs: bit i is that of the i-th value of a group."""
        packed = np.packbits(self.negative_GLR.numpy(), axis=1, bitorder="little")
        return np.ascontiguousarray(packed[:, 0])

    def _signs(self, scaled_LR: torch.Tensor, weight_L: torch.Tensor) -> torch.Tensor:
        """The signs of the targets; if the number of minus signs must be even and is not, the cheapest one changes."""
        negative_LR = scaled_LR < 0
        if self._table.even_signs:
            odd_R = negative_LR.sum(dim=0) % 2 == 1
            cheapest_R = (scaled_LR.square() * weight_L[:, None]).argmin(dim=0)
            flipped_R = negative_LR.gather(0, cheapest_R[None]) ^ odd_R
            negative_LR.scatter_(0, cheapest_R[None], flipped_R)
        return negative_LR

    def _nearest(self, magnitude_LR: torch.Tensor, weight_L: torch.Tensor) -> torch.Tensor:
        """The table's vectors nearest to the magnitudes, [V, R]; entries of the wrong sign count as negative ones."""
        entries_TE = self._table.entries_TE
        length, n_rows = entries_TE.shape[1], magnitude_LR.shape[1]
        nearest_VR = torch.empty(SIGN_LENGTH // length, n_rows, dtype=torch.int64)
        for vector, magnitude_ER in enumerate(magnitude_LR.split(length)):
            weighted_TE = entries_TE * weight_L[vector * length : (vector + 1) * length]
            # w (m - v)^2 without its constant: v . w v - 2 m . w v, as one product with a 1 behind the magnitudes
            form_FT = torch.cat([-2 * weighted_TE, (weighted_TE * entries_TE).sum(dim=1, keepdim=True)], dim=1).T
            magnitude_RF = torch.cat([magnitude_ER, torch.ones(1, n_rows)]).T.contiguous()
            for first in range(0, n_rows, _SEARCHED_ROWS):
                costs_RT = (magnitude_RF[first : first + _SEARCHED_ROWS] @ form_FT).numpy()
                # numpy's argmin over what lies together is twenty times as fast as torch's
                nearest_VR[vector, first : first + _SEARCHED_ROWS] = torch.from_numpy(costs_RT.argmin(axis=1))
        return nearest_VR

    def _values(self, index_VR: torch.Tensor, negative_LR: torch.Tensor) -> torch.Tensor:
        """The chosen vectors with their signs, in units of the scale."""
        magnitude_LR = self._table.entries_TE[index_VR].permute(0, 2, 1).reshape(SIGN_LENGTH, -1)
        return torch.where(negative_LR, -magnitude_LR, magnitude_LR)


def _cost(errors_LR: torch.Tensor, metric_LL: torch.Tensor) -> torch.Tensor:
    return ((metric_LL @ errors_LR) * errors_LR).sum(dim=0)
