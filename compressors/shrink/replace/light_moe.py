"""LightMoE: experts of little contribution become a base for each group, plus an adapter for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from compressors.model.description.shared_bases import SharedBases
from compressors.model.errors import InputError
from compressors.shrink.decompose.factors import check_rank
from compressors.shrink.decompose.svd import expert_moments, truncate
from compressors.shrink.merge.alignment import match_weights_and_activations
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs, Routes, SharedParts
from compressors.shrink.replace.grouping import by_number, by_similarity
from compressors.shrink.replace.selection import contributions

__all__ = ["LightMoE"]


@dataclass(frozen=True)
class LightMoE:
    """Replaces experts: Hao et al., "LightMoE" (arXiv 2603.12645), whose formulas are not public.

    Published is the form: experts are grouped, each group shares a base, and each expert keeps an adapter (rank 16).
    Ours is the rest. The experts of least contribution are replaced (:func:`contributions`), and grouped by what router
    and outputs say of them. A base is the mean of its group, weighted by contribution, after each member's neurons were
    put in the order of the member that contributes most. Gate, up and down then get an adapter each: the best of its
    rank for the difference from the base, judged by the outputs on the expert's own sample tokens
    (:func:`~compressors.shrink.decompose.svd.truncate`). At full rank every expert is the original, with its neurons in
    another order. Experts with biases keep the order of their neurons, because biases are not part of the adapters.

    Attributes:
        n_replaced: the number of experts to replace.
        n_bases: the number of groups; each has two experts at least.
        rank: the rank of the adapters.
        selects: False takes the first experts by number: for comparison.
        groups: False groups neighbours by number: for comparison.

    Raises (when called):
        InputError: a number is not possible for the block.
    """

    n_replaced: int
    n_bases: int
    rank: int
    selects: bool = True
    groups: bool = True
    needs: ClassVar[Needs] = Needs.INPUTS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """Replaces experts of a block; of equal contributions the lower index is replaced first."""
        check_rank(self.rank, block)
        if not 2 * self.n_bases <= self.n_replaced <= block.n_experts or self.n_bases < 1:
            raise InputError(
                f"{self.n_replaced} of {block.n_experts} experts cannot stand on {self.n_bases} bases: give at least "
                "two experts for each base"
            )
        shares_E = contributions(evidence.statistics)
        order = shares_E.argsort(stable=True) if self.selects else torch.arange(block.n_experts)
        chosen = sorted(order[: self.n_replaced].tolist())
        if self.groups:
            groups = by_similarity(block, evidence, chosen, self.n_bases)
        else:
            groups = by_number(chosen, self.n_bases)
        return CompressedBlock.of_parts(block, self._parts(block, evidence, shares_E, groups))

    def _parts(
        self, block: MoeBlock, evidence: Evidence, shares_E: torch.Tensor, groups: Sequence[Sequence[int]]
    ) -> SharedParts:
        routes = block.route(evidence.router_sample_TD)
        base_of: list[int | None] = [None] * block.n_experts
        bases, adapters = [], {}
        for number, group in enumerate(groups):
            orders = _orders(block, evidence, group, shares_E)
            base = _mean(block, orders, shares_E)
            bases.append(base)
            for expert, order_F in orders.items():
                base_of[expert] = number
                adapters[expert] = self._adapters(block, evidence, routes, expert, order_F, base)
        return SharedParts(SharedBases(tuple(base_of), len(bases), self.rank), tuple(bases), adapters)

    def _adapters(
        self,
        block: MoeBlock,
        evidence: Evidence,
        routes: Routes,
        expert: int,
        order_F: torch.Tensor,
        base: tuple[torch.Tensor, ...],
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """A [R, I] and B [O, R] of each matrix of an expert whose neurons are put in this order."""
        moments = expert_moments(block, evidence, routes, expert)
        moment_of_inputs = [moments.gate_up_DD] * block.n_inputs
        moment_of_each = [*moment_of_inputs, moments.down_FF[order_F][:, order_F]]
        found = []
        for own_OI, base_OI, moment_II in zip(_matrices(block, expert, order_F), base, moment_of_each, strict=True):
            left_Or, right_rI = truncate(own_OI - base_OI.float(), moment_II, self.rank)
            found.append((right_rI.float().contiguous(), left_Or.float().contiguous()))
        return tuple(found)


def _orders(
    block: MoeBlock, evidence: Evidence, group: Sequence[int], shares_E: torch.Tensor
) -> dict[int, torch.Tensor]:
    """The order of each member's neurons beside those of the one that contributes most: int64 [F]."""
    reference = max(group, key=lambda expert: (float(shares_E[expert]), -expert))
    same_F = torch.arange(block.width)
    if block.gate_up_bias_EF is not None:
        return dict.fromkeys(group, same_F)
    return {
        expert: same_F
        if expert == reference
        else match_weights_and_activations(block, evidence.sample_TD, reference, expert)
        for expert in group
    }


def _mean(block: MoeBlock, orders: dict[int, torch.Tensor], shares_E: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The members' matrices, averaged by contribution, in storage dtype."""
    shares = {expert: float(shares_E[expert]) for expert in orders}
    total = sum(shares.values())
    sums = [torch.zeros(matrix.shape) for matrix in _matrices(block, next(iter(orders)), None)]
    for expert, order_F in orders.items():
        share = shares[expert] / total if total > 0 else 1 / len(orders)
        for matrix_sum, matrix in zip(sums, _matrices(block, expert, order_F), strict=True):
            matrix_sum += share * matrix
    return tuple(matrix_sum.to(block.down_EDF.dtype) for matrix_sum in sums)


def _matrices(block: MoeBlock, expert: int, order_F: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Gate, up and down of an expert, float32, with its neurons in an order; None: as they are."""
    order_F = torch.arange(block.width) if order_F is None else order_F
    of_inputs = (matrix_FD[order_F] for matrix_FD in block.input_matrices(expert))
    return (*of_inputs, block.down(expert)[:, order_F])
