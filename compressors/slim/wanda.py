"""Wanda: the weights that matter least for their row's output become zero, the others stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compressors.moe_block import CompressedBlock, Evidence, MoeBlock
from compressors.slim.matrices import Change, change_matrices
from compressors.slim.sparsity import Pattern, check_columns, check_sparsity, highest_mask, two_of_four_mask

__all__ = ["Wanda"]


@dataclass(frozen=True)
class Wanda:
    """Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695).

    A weight's score is |W_ij| * ||X_j||_2. Unstructured: each output row loses its ``round(sparsity * N)`` lowest
    scores. 2:4: each row keeps the two highest of every four consecutive inputs. An expert that no sample token chose
    is pruned by magnitude. For comparison, in torch: the containers store zeros like any other weight.

    Raises:
        InputError: when made, the sparsity or the pattern is not possible.
    """

    sparsity: float
    pattern: Pattern = "unstructured"
    needs_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, self.pattern)

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """The block with sparse experts.

        Raises:
            InputError: the pattern is 2:4 and the hidden size or the width is not a multiple of 4.
        """
        return change_matrices(block, evidence, self._calibrate)

    def _calibrate(self, inputs_nN: torch.Tensor) -> Change:
        check_columns(inputs_nN.shape[1], self.pattern)
        norms_N = inputs_nN.norm(dim=0) if len(inputs_nN) else torch.ones(inputs_nN.shape[1])

        def change(weights_RN: torch.Tensor) -> torch.Tensor:
            scores_RN = weights_RN.abs() * norms_N
            kept_RN = two_of_four_mask(scores_RN) if self.pattern == "2:4" else highest_mask(scores_RN, self.sparsity)
            return weights_RN * kept_RN

        return change
