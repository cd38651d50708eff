"""Truncated singular value decomposition that minimises the error of the outputs, not that of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compressors.model.description.shared_bases import SharedBases
from compressors.shrink.decompose.factors import ExpertMatrices, LowRank, check_rank, with_factors
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs, Routes, SharedParts, second_moment

__all__ = ["ActivationSvd", "ExpertMoments", "SvdFactors", "decompose_experts", "expert_moments", "truncate"]


@dataclass(frozen=True)
class ExpertMoments:
    """Second moments of the inputs of one expert's matrices, ready to whiten with: float64, positive definite."""

    gate_up_DD: torch.Tensor
    down_FF: torch.Tensor


@dataclass(frozen=True)
class SvdFactors:
    """Every expert matrix as a product of two."""

    of_inputs: tuple[LowRank, ...]  # gate and up, or up alone
    down: LowRank

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense experts: float32 gate_up [E, 2F, D], gate rows first, down [E, D, F]."""
        return torch.cat([factors.product() for factors in self.of_inputs], dim=1), self.down.product()

    def parts(self, dtype: torch.dtype) -> SharedParts:
        """The products as adapters on no base."""
        shared = SharedBases((SharedBases.ZERO,) * len(self.down.left_EOr), 0, self.down.left_EOr.shape[-1])
        return SharedParts(shared, (), self.adapters())

    def adapters(self) -> dict[int, tuple[tuple[torch.Tensor, torch.Tensor], ...]]:
        """A [r, I] and B [O, r] of each expert's matrices."""
        matrices = (*self.of_inputs, self.down)
        return {
            expert: tuple((matrix.right_ErI[expert], matrix.left_EOr[expert]) for matrix in matrices)
            for expert in range(len(self.down.left_EOr))
        }


@dataclass(frozen=True)
class ActivationSvd:
    """Cuts each expert matrix to ``rank`` so that its outputs on the expert's routed sample tokens change least.

    SVD-LLM's truncation-aware whitening (Wang et al., arXiv 2403.07378); ASVD (Yuan et al., arXiv 2312.05821) is the
    same with the second moment's diagonal alone. Gate, up and down are cut one by one, each with the inputs that it has
    in the original expert. SVD-LLM's later parameter update is not part of it.
    """

    rank: int
    needs: ClassVar[Needs] = Needs.INPUTS

    def decompose(self, block: MoeBlock, evidence: Evidence) -> SvdFactors:
        """The factors of a block's experts.

        Raises:
            InputError: the rank is not between 1 and min(D, F).
        """
        check_rank(self.rank, block)
        return decompose_experts(block, evidence, self.rank)

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """Returns the block with its experts' matrices cut; raises the errors of :meth:`decompose`."""
        return with_factors(block, self.decompose(block, evidence))


def decompose_experts(block: MoeBlock, evidence: Evidence, rank: int, base: ExpertMatrices | None = None) -> SvdFactors:
    """Cuts each expert of a block, or its difference from ``base``, to a rank; the tokens are always the block's."""
    routes = block.route(evidence.router_sample_TD)
    pairs: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(block.n_inputs)]
    downs = []
    for expert in range(block.n_experts):
        moments = expert_moments(block, evidence, routes, expert)
        matrices = ExpertMatrices.of(block, expert)
        if base is not None:
            matrices = matrices.minus(base)
        for found, matrix_FD in zip(pairs, matrices.of_inputs, strict=True):
            found.append(truncate(matrix_FD, moments.gate_up_DD, rank))
        downs.append(truncate(matrices.down_DF, moments.down_FF, rank))
    return SvdFactors(tuple(map(LowRank.stack, pairs)), LowRank.stack(downs))


def expert_moments(block: MoeBlock, evidence: Evidence, routes: Routes, expert: int) -> ExpertMoments:
    """Second moments of one expert's inputs, and of its intermediate activations, over its routed sample tokens."""
    tokens, _gates = routes.of_expert(expert)
    inputs_nD = evidence.sample_TD[tokens]
    return ExpertMoments(_whitening_moment(inputs_nD), _whitening_moment(block.hidden(expert, inputs_nD)))


def truncate(matrix_OI: torch.Tensor, moment_II: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the matrix W' of a rank that minimises |(W - W') L| for L L^T = the inputs' second moment.

    The minimum is the truncated SVD of W L times the inverse of L (arXiv 2403.07378, section 3). With U the first left
    singular vectors that equals U U^T W, which needs no inverse.

    Returns:
        U [O, r] and U^T W [r, I], float64.
    """
    matrix_OI = matrix_OI.double()
    left_OO, _values, _right = torch.linalg.svd(matrix_OI @ torch.linalg.cholesky(moment_II), full_matrices=False)
    left_Or = left_OO[:, :rank]
    return left_Or, left_Or.T @ matrix_OI


def _whitening_moment(inputs_nI: torch.Tensor) -> torch.Tensor:
    """The sum of x x^T with one token of mean norm added in every direction; without tokens the identity: plain SVD.

    The ridge fades as tokens come in. Without it the cut overfits a few hundred tokens: on tokens outside the sample
    it is worse, on other text even worse than plain SVD. Half or twice the ridge was no better on the trained fixtures.
    """
    moment_II = second_moment(inputs_nI)
    mean_square = moment_II.trace() / max(len(inputs_nI), 1)
    moment_II.diagonal().add_(mean_square if mean_square > 0 else 1.0)
    return moment_II
