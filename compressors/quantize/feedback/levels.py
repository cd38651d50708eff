"""Values on a scale: level x scale + offset, rounded a column of all rows at a time.

Letters: N columns, R rows, S groups of columns with one scale, C codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["LevelGrid", "Levels"]


@dataclass(frozen=True)
class Levels:
    """The levels of a format's codes, which are integers.

    ``nearest`` is None if every integer from ``lowest`` to ``highest`` is a level; else it holds the nearest level of
    every half integer from ``lowest`` on, because the borders between levels are half integers.
    """

    lowest: int
    highest: int
    codes: npt.NDArray[np.uint8]  # by level - lowest
    nearest: npt.NDArray[np.float32] | None

    @classmethod
    def uniform(cls, lowest: int, highest: int) -> Levels:
        """Every integer; code 0 is the lowest."""
        return cls(lowest, highest, np.arange(highest - lowest + 1, dtype=np.uint8), None)

    @classmethod
    def of(cls, level_C: npt.NDArray[np.float32], lowest: int | None = None) -> Levels:
        """``level_C``: the level of every code; those below ``lowest`` are not used."""
        lowest = int(level_C.min()) if lowest is None else lowest
        highest = int(level_C.max())
        codes = np.zeros(highest - lowest + 1, dtype=np.uint8)
        for code, level in reversed(list(enumerate(level_C.astype(int)))):
            if level >= lowest:
                codes[level - lowest] = code
        sorted_C = np.unique(level_C[level_C >= lowest])
        if len(sorted_C) == len(codes):
            return cls(lowest, highest, codes, None)
        middle_H = lowest + (np.arange(2 * (highest - lowest)) + 0.5) / 2
        nearest_H = sorted_C[np.abs(middle_H[:, None] - sorted_C).argmin(axis=1)]
        return cls(lowest, highest, codes, nearest_H.astype(np.float32))

    def round(self, scaled_R: npt.NDArray[np.float32], out_R: npt.NDArray[np.float32]) -> None:
        """Writes the nearest level of each number; ``scaled_R`` is overwritten. NaN becomes a level too."""
        if self.nearest is None:
            np.rint(scaled_R, out=out_R)
            np.fmax(out_R, np.float32(self.lowest), out=out_R)
            np.fmin(out_R, np.float32(self.highest), out=out_R)
            return
        scaled_R -= np.float32(self.lowest)
        scaled_R *= np.float32(2)
        np.fmax(scaled_R, np.float32(0), out=scaled_R)
        np.fmin(scaled_R, np.float32(len(self.nearest) - 1), out=scaled_R)
        np.take(self.nearest, scaled_R.astype(np.intp), out=out_R)


class LevelGrid:
    """The values of a matrix's columns, and the levels chosen so far; columns in the order of the couplings.

    value = level x scale + offset.
    """

    length = 1

    def __init__(
        self,
        levels: Levels,
        scale_SR: npt.NDArray[np.float32],
        scale_of_N: npt.NDArray[np.intp],
        offset_SR: npt.NDArray[np.float32] | None = None,
    ) -> None:
        self._levels, self.scale_of_N, self._offset_SR = levels, scale_of_N, offset_SR
        self.rescale(scale_SR)
        self._chosen_NR = np.zeros((len(scale_of_N), scale_SR.shape[1]), dtype=np.float32)
        self._scaled_R = np.empty(scale_SR.shape[1], dtype=np.float32)
        self._value_1R = np.empty((1, scale_SR.shape[1]), dtype=np.float32)

    def rescale(self, scale_SR: npt.NDArray[np.float32]) -> None:
        """Replaces the scales; codes and offsets stay."""
        self.scale_SR = scale_SR
        with np.errstate(divide="ignore"):
            self._inverse_SR = np.where(scale_SR == 0, np.float32(0), 1 / scale_SR)

    def round_group(
        self, group: int, targets_LR: torch.Tensor, metric_LL: torch.Tensor, current_LR: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the nearest value of every row; the metric of a single column does not matter."""
        scale, level_R, value_R = self.scale_of_N[group], self._chosen_NR[group], self._value_1R[0]
        target_R: npt.NDArray[np.float32] = targets_LR.numpy()[0]
        if self._offset_SR is not None:
            np.subtract(target_R, self._offset_SR[scale], out=self._scaled_R)
            target_R = self._scaled_R
        np.multiply(target_R, self._inverse_SR[scale], out=self._scaled_R)
        self._levels.round(self._scaled_R, level_R)
        np.multiply(level_R, self.scale_SR[scale], out=value_R)
        if self._offset_SR is not None:
            value_R += self._offset_SR[scale]
        return torch.from_numpy(self._value_1R)

    def levels_NR(self) -> npt.NDArray[np.float32]:
        """The chosen levels."""
        return self._chosen_NR

    def codes_NR(self) -> npt.NDArray[np.uint8]:
        """The codes of the chosen levels."""
        return self._levels.codes[(self._chosen_NR - np.float32(self._levels.lowest)).astype(np.intp)]
