"""SparseGPT: weights become zero column by column, and the columns after them make up for the error."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.arms.column_sweep import BLOCK, inverse_factor, sweep
from benchmarks.arms.matrices import Change
from benchmarks.arms.sparsity import Sparsity, highest_mask, two_of_four_mask

__all__ = ["SparseGpt"]


@dataclass(frozen=True)
class SparseGpt(Sparsity):
    """Frantar and Alistarh, "SparseGPT" (arXiv 2301.00774), algorithm 1.

    A weight's score is w^2 / [H_F^-1]_jj, what setting it to zero costs, F being its column and those after it.
    Unstructured: of each 128 columns, all rows together, the ``round(sparsity * R * 128)`` lowest scores go, chosen
    when the sweep reaches them. 2:4: each row keeps the two highest of every four columns, likewise. The damping is
    1 % of H's mean diagonal, as in the public code; its two departures from the algorithm are not taken over: one
    weight too many is dropped per block (``<=`` its threshold), and inputs that are always zero lose their weights.
    An expert that no sample token chose is pruned by magnitude. For comparison, in torch: the containers store zeros
    like any other weight.
    """

    def _calibrate(self, inputs_nN: torch.Tensor) -> Change:
        factor_NN = inverse_factor(inputs_nN)
        costs_N = factor_NN.diagonal().square()
        n_together = 4 if self.pattern == "2:4" else BLOCK

        def change(weights_RN: torch.Tensor) -> torch.Tensor:
            kept_RN = torch.ones_like(weights_RN, dtype=torch.bool)

            def settle(current_RN: torch.Tensor, column: int) -> torch.Tensor:
                if column % n_together == 0:
                    chosen = slice(column, column + n_together)
                    kept_RN[:, chosen] = self._mask(current_RN[:, chosen].square() / costs_N[chosen])
                return current_RN[:, column] * kept_RN[:, column]

            return sweep(weights_RN, factor_NN, settle)

        return change

    def _mask(self, scores_RB: torch.Tensor) -> torch.Tensor:
        if self.pattern == "2:4":
            return two_of_four_mask(scores_RB)
        return highest_mask(scores_RB.reshape(1, -1), self.sparsity).reshape(scores_RB.shape)
