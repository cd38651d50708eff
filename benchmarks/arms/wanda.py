"""Wanda: the weights that matter least for their row's output become zero, the others stay as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.arms.matrices import Change
from benchmarks.arms.sparsity import Sparsity, highest_mask, two_of_four_mask

__all__ = ["Wanda"]


@dataclass(frozen=True)
class Wanda(Sparsity):
    """Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695).

    A weight's score is |W_ij| * ||X_j||_2. Unstructured: each output row loses its ``round(sparsity * N)`` lowest
    scores. 2:4: each row keeps the two highest of every four consecutive inputs. An expert that no sample token chose
    is pruned by magnitude. For comparison, in torch: the containers store zeros like any other weight.
    """

    def _calibrate(self, inputs_nN: torch.Tensor) -> Change:
        norms_N = inputs_nN.norm(dim=0) if len(inputs_nN) else torch.ones(inputs_nN.shape[1])

        def change(weights_RN: torch.Tensor) -> torch.Tensor:
            scores_RN = weights_RN.abs() * norms_N
            kept_RN = two_of_four_mask(scores_RN) if self.pattern == "2:4" else highest_mask(scores_RN, self.sparsity)
            return weights_RN * kept_RN

        return change
