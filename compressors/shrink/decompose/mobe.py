"""MoBE: gate and up projections as an expert's own matrix times a mix of bases that the layer shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn import functional

from compressors.model.errors import InputError
from compressors.shrink.decompose.factors import check_rank, with_factors
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs, SharedParts

__all__ = ["Activation", "Mobe", "MobeFactors", "SharedBases"]

Activation = Literal["tanh", "silu"]

_EXPERTS_AT_ONCE = 8  # bounds the activations of a step; the gradient is the same sum


@dataclass(frozen=True)
class SharedBases:
    """One projection of every expert: W_i = A_i act(sum over k of alpha_ik B_k)."""

    own_EFr: torch.Tensor  # A, float32
    mix_EM: torch.Tensor  # alpha, float32; a row is positive and sums to 1
    bases_MrD: torch.Tensor  # B, float32
    activation: Activation

    def product(self) -> torch.Tensor:
        """The projections: float32 [E, F, D]."""
        chunks = torch.arange(len(self.own_EFr)).split(_EXPERTS_AT_ONCE)
        return torch.cat([self.of_experts(experts) for experts in chunks])

    def of_experts(self, experts: torch.Tensor) -> torch.Tensor:
        """The projections of some experts (indices [n]): float32 [n, F, D]."""
        mixed_nrD = torch.einsum("nM,MrD->nrD", self.mix_EM[experts], self.bases_MrD)
        activated_nrD = mixed_nrD.tanh() if self.activation == "tanh" else functional.silu(mixed_nrD)
        return self.own_EFr[experts] @ activated_nrD


@dataclass(frozen=True)
class MobeFactors:
    """Gate and up projections with shared bases; the down projections are as they were."""

    of_inputs: tuple[SharedBases, ...]  # gate and up, or up alone
    down_EDF: torch.Tensor

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense experts: float32 gate_up [E, 2F, D], gate rows first, down [E, D, F] in its own dtype."""
        return torch.cat([bases.product() for bases in self.of_inputs], dim=1), self.down_EDF

    def parts(self, dtype: torch.dtype) -> SharedParts | None:
        """None: the bases pass through a function before they are mixed, so no expert is a base plus a product."""
        return None


@dataclass(frozen=True)
class Mobe:
    """Fits ``n_bases`` shared bases by Adam on the reconstruction error: MoBE, arXiv 2508.05257, code inclusionAI/MoBE.

    As published: the mixing weights are a softmax; the weights are fitted in units of their standard deviation; full
    batch, a constant learning rate of 0.07, 10,000 to 15,000 steps, the best state kept; the start is a truncated SVD
    of as many groups of neighbouring experts as there are bases. Nothing is random, so there is no seed. Unlike
    the code, the start is in the units of the fit, and the groups may differ by one expert.
    ``rank`` is the number of rows of a basis; None is the published choice, the expert's width (D where that is less).
    """

    n_bases: int
    rank: int | None = None
    steps: int = 10_000
    learning_rate: float = 0.07
    activation: Activation = "silu"
    needs: ClassVar[Needs] = Needs.WEIGHTS

    def decompose(self, block: MoeBlock, evidence: Evidence) -> MobeFactors:
        """The factors of a block's experts.

        Raises:
            InputError: there are more bases than experts, or the rank, the steps or the learning rate are out of range.
        """
        rank = min(block.width, block.size) if self.rank is None else self.rank
        check_rank(rank, block)
        if not 1 <= self.n_bases <= block.n_experts:
            raise InputError(
                f"{self.n_bases} bases for {block.n_experts} experts: give a number from 1 to the experts'"
            )
        if self.steps < 1 or not self.learning_rate > 0:
            raise InputError(f"{self.steps} steps at learning rate {self.learning_rate}: both must be above 0")
        matrices = block.gate_up_EFD.split(block.width, dim=1)
        of_inputs = tuple(self._fit(weights_EFD.float(), rank) for weights_EFD in matrices)
        return MobeFactors(of_inputs, block.down_EDF)

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """Returns the block with its experts rewritten; raises the errors of :meth:`decompose`."""
        return with_factors(block, self.decompose(block, evidence))

    @torch.enable_grad()
    def _fit(self, weights_EFD: torch.Tensor, rank: int) -> SharedBases:
        unit = weights_EFD.std()
        targets_EFD = weights_EFD / unit
        parameters = _start(targets_EFD, self.n_bases, rank)
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        best_loss, best = float("inf"), parameters
        for step in range(self.steps + 1):
            optimizer.zero_grad()
            loss = _accumulate_gradient(targets_EFD, parameters, self.activation)
            if loss < best_loss:
                best_loss, best = loss, [parameter.detach().clone() for parameter in parameters]
            if step < self.steps:
                optimizer.step()
        own_EFr, logits_EM, bases_MrD = best
        return SharedBases(own_EFr * unit, logits_EM.softmax(-1), bases_MrD, self.activation)


def _start(targets_EFD: torch.Tensor, n_bases: int, rank: int) -> list[torch.Tensor]:
    """Returns A, the logits of alpha, and B: if a group's stacked experts are U S V^T, its B is V^T cut to the rank.

    An expert's A is its rows of U S, which are its weights times V.
    """
    own, bases = [], []
    for group_nFD in targets_EFD.tensor_split(n_bases):
        _left, _values, right = torch.linalg.svd(group_nFD.flatten(0, 1), full_matrices=False)
        bases.append(right[:rank])
        own.append(group_nFD @ right[:rank].T)
    group_of_expert_E = torch.arange(n_bases).repeat_interleave(torch.tensor([len(group) for group in own]))
    start = [torch.cat(own), functional.one_hot(group_of_expert_E, n_bases).float(), torch.stack(bases)]
    return [parameter.requires_grad_() for parameter in start]


def _accumulate_gradient(targets_EFD: torch.Tensor, parameters: list[torch.Tensor], activation: Activation) -> float:
    """Returns the mean squared error over all experts, and adds its gradient to the parameters'."""
    own_EFr, logits_EM, bases_MrD = parameters
    total = 0.0
    for experts in torch.arange(len(targets_EFD)).split(_EXPERTS_AT_ONCE):
        fitted = SharedBases(own_EFr, logits_EM.softmax(-1), bases_MrD, activation)
        squares = (fitted.of_experts(experts) - targets_EFD[experts]).square().sum() / targets_EFD.numel()
        squares.backward()
        total += squares.item()
    return total
