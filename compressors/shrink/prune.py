"""Drops experts: a layer keeps those with the highest scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compressors.model.errors import InputError
from compressors.shrink.criteria import CRITERIA, CRITERION_NAMES, REMOVAL_ERROR
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock
from compressors.shrink.needs import Needs
from compressors.shrink.removal_error import removal_error

__all__ = ["Prune", "highest", "scores", "survivors"]


@dataclass(frozen=True)
class Prune:
    """Keeps the ``n_experts`` experts with the highest scores, in index order; of equal scores the lower index wins.

    Router rows go with their experts, and top-k never exceeds the experts left; no weight changes. Protected experts
    are kept whatever their scores (:func:`compressors.shrink.allocation.super_experts`).

    Raises:
        InputError: the criterion is unknown; when called, ``n_experts`` is not between 1 (or the number of protected
            experts, where that is higher) and the block's count, a protected expert is not in the block, or the groups
            that the router chooses from first cannot stay equal in size.
    """

    criterion: str  # one of CRITERION_NAMES
    n_experts: int
    protected: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Checks the fields that can be checked without a block."""
        _check_criterion(self.criterion)

    @property
    def needs(self) -> Needs:
        """The sums of the calibration pass, or inputs for the removal error."""
        return Needs.INPUTS if self.criterion == REMOVAL_ERROR else Needs.STATISTICS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """The block of the survivors."""
        lowest = max(1, len(self.protected))
        if not lowest <= self.n_experts <= block.n_experts:
            raise InputError(
                f"cannot keep {self.n_experts} experts of {block.n_experts}, {len(self.protected)} of them protected: "
                f"give a number from {lowest} to {block.n_experts}"
            )
        strangers = sorted(self.protected - set(range(block.n_experts)))
        if strangers:
            raise InputError(
                f"cannot protect the experts {strangers}: the layer has experts 0 to {block.n_experts - 1}"
            )
        scores_E = scores(self.criterion, block, evidence)
        scores_E = scores_E.index_fill(0, torch.tensor(sorted(self.protected), dtype=torch.int64), torch.inf)
        kept = survivors(block, scores_E, self.n_experts)
        lost = sorted(self.protected - set(kept))
        if lost:
            raise InputError(
                f"cannot protect the experts {lost}: each group of the router keeps "
                f"{self.n_experts // block.routing.n_groups} experts, and more of one group are protected; keep more"
            )
        return CompressedBlock(block.keep(kept), tuple((expert,) for expert in kept))


def scores(criterion: str, block: MoeBlock, evidence: Evidence) -> torch.Tensor:
    """A criterion's scores of one layer's experts: float64 [E].

    ``removal-error`` runs the block on the evidence's inputs; the others read its statistics.

    Raises:
        InputError: the criterion is unknown.
    """
    _check_criterion(criterion)
    if criterion == REMOVAL_ERROR:
        return removal_error(block, evidence.sample_TD, evidence.router_inputs_TD)
    return CRITERIA[criterion](evidence.statistics)


def survivors(block: MoeBlock, scores_E: torch.Tensor, n_experts: int) -> tuple[int, ...]:
    """Returns the experts with the highest scores, ascending, equally many from each group of the router.

    Raises:
        InputError: the groups do not divide the number.
    """
    n_groups = block.routing.n_groups
    if n_experts % n_groups:
        raise InputError(
            f"cannot keep {n_experts} experts: the router chooses among {n_groups} groups, which must stay equal in "
            f"size, so give a multiple of {n_groups}"
        )
    size = block.n_experts // n_groups
    groups = (highest(group_M, n_experts // n_groups) for group_M in scores_E.split(size))
    return tuple(group * size + expert for group, kept in enumerate(groups) for expert in kept)


def highest(scores_E: torch.Tensor, n_experts: int) -> tuple[int, ...]:
    """Indices of the ``n_experts`` highest scores, ascending; of equal scores the lower index wins."""
    order = torch.argsort(scores_E, descending=True, stable=True)
    return tuple(sorted(order[:n_experts].tolist()))


def _check_criterion(criterion: str) -> None:
    if criterion not in CRITERION_NAMES:
        raise InputError(f"there is no pruning criterion {criterion!r}: use one of {', '.join(CRITERION_NAMES)}")
