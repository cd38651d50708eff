"""D2-MoE: one base that a layer's experts share, plus a low-rank part for each expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compressors.model.description.shared_bases import SharedBases
from compressors.shrink.decompose.factors import ExpertMatrices, check_rank, with_factors
from compressors.shrink.decompose.svd import SvdFactors, decompose_experts
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs, SharedParts

__all__ = ["D2Moe", "D2MoeFactors", "usage_weighted_base"]


@dataclass(frozen=True)
class D2MoeFactors:
    """One dense base for the layer and a low-rank delta for each expert."""

    base: ExpertMatrices  # float32
    deltas: SvdFactors

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense experts: float32 gate_up [E, 2F, D], gate rows first, down [E, D, F]."""
        gate_up_EFD, down_EDF = self.deltas.materialize()
        return gate_up_EFD + torch.cat(self.base.of_inputs), down_EDF + self.base.down_DF

    def parts(self, dtype: torch.dtype) -> SharedParts:
        """The base, rounded to this dtype, and the deltas as adapters on it."""
        adapters = self.deltas.adapters()
        base = tuple(matrix.to(dtype) for matrix in (*self.base.of_inputs, self.base.down_DF))
        rank = self.deltas.down.left_EOr.shape[-1]
        return SharedParts(SharedBases((0,) * len(adapters), 1, rank), (base,), adapters)


@dataclass(frozen=True)
class D2Moe:
    """Base plus deltas of ``rank``, cut by activation-scaled SVD: Gu et al., arXiv 2502.17298, code lliai/D2MoE.

    The base is the usage-weighted mean of the experts, ``merge_method="freq"`` of the public code. The paper's choice
    multiplies usage by the Fisher information of each weight; that needs gradients through the whole model, which are
    not in the evidence about one layer. Each delta has factors of its own (the code can also share the right ones
    in the layer). The base is not pruned (``pp_ratio`` 0 of the code).
    """

    rank: int
    needs: ClassVar[Needs] = Needs.INPUTS

    def decompose(self, block: MoeBlock, evidence: Evidence) -> D2MoeFactors:
        """The factors of a block's experts.

        Raises:
            InputError: the rank is not between 1 and min(D, F).
        """
        check_rank(self.rank, block)
        base = usage_weighted_base(block, evidence.statistics.count_E)
        return D2MoeFactors(base, decompose_experts(block, evidence, self.rank, base))

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """Returns the block with its experts rewritten; raises the errors of :meth:`decompose`."""
        return with_factors(block, self.decompose(block, evidence))


def usage_weighted_base(block: MoeBlock, count_E: torch.Tensor) -> ExpertMatrices:
    """The mean of the experts, each weighted by the calibration tokens that chose it: float32.

    All experts count alike if no token chose any.
    """
    weights_E = count_E if count_E.sum() > 0 else torch.ones_like(count_E)
    weights_E = weights_E / weights_E.sum()
    *of_inputs, down_DF = (torch.zeros_like(matrix, dtype=torch.float64) for matrix in _matrices(block, 0))
    for expert, weight in enumerate(weights_E.tolist()):
        for total, matrix in zip((*of_inputs, down_DF), _matrices(block, expert), strict=True):
            total += weight * matrix
    return ExpertMatrices(tuple(total.float() for total in of_inputs), down_DF.float())


def _matrices(block: MoeBlock, expert: int) -> tuple[torch.Tensor, ...]:
    of_inputs, down_DF = ExpertMatrices.of(block, expert)
    return (*of_inputs, down_DF)
