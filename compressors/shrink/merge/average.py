"""Makes one expert of each group: the weighted mean of its members."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from compressors.model.errors import InputError
from compressors.shrink.moe_block import CompressedBlock, MoeBlock

__all__ = ["Alignment", "merge_groups", "ordered", "require_possible"]

Alignment = Callable[[int, int], torch.Tensor]
"""``align(reference, expert)``: the expert's neuron for each neuron of the reference, int64 [F]."""


def require_possible(n_experts: int, block: MoeBlock) -> None:
    """Checks a number of experts to merge into.

    Raises:
        InputError: it is not between 1 and the block's number of experts.
    """
    if not 1 <= n_experts <= block.n_experts:
        raise InputError(
            f"cannot merge {block.n_experts} experts into {n_experts}: give a number from 1 to all of them"
        )


def ordered(groups: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Groups as a compressed block lists them: by their first members, and the other members ascending."""
    return tuple(sorted((group[0], *sorted(group[1:])) for group in groups))


def merge_groups(
    block: MoeBlock,
    groups: tuple[tuple[int, ...], ...],
    weights_E: torch.Tensor,
    *,
    align: Alignment | None = None,
    average_router: bool,
) -> CompressedBlock:
    """Replaces each group by the weighted mean of its members; a group of one stays bit-identical.

    Means are computed in float32 and kept in the storage dtype of the experts, the router's in float32. A group whose
    weights are all zero is averaged plainly.

    Args:
        block: the experts.
        groups: each expert in one group; the expert that the others are aligned to comes first.
        weights_E: how much each expert counts: usage or saliency, not negative.
        align: orders the neurons of a group's other members as its first member's; without it they stay as they are.
        average_router: whether the router row is the members' weighted mean, or that of the first member.
    """
    merged = block.keep([group[0] for group in groups])
    changed = frozenset(index for index, group in enumerate(groups) if len(group) > 1)
    for index in changed:
        group = groups[index]
        shares = _shares(weights_E, group)
        # `keep` copied what it kept, so the given block does not change
        merged.gate_up_EFD[index], merged.down_EDF[index] = _weighted_mean(block, group, shares, align)
        if average_router:
            merged.router_ED[index] = torch.tensor(shares) @ block.router_ED[list(group)]
    return CompressedBlock(merged, groups, changed, router_changed=average_router and bool(changed))


def _shares(weights_E: torch.Tensor, group: Sequence[int]) -> list[float]:
    weights = weights_E[list(group)].double()
    if not weights.any():
        weights = torch.ones_like(weights)
    return [float(share) for share in weights / weights.sum()]


def _weighted_mean(
    block: MoeBlock, group: Sequence[int], shares: Sequence[float], align: Alignment | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up rows, float32 [2F, D], and the down projection, float32 [D, F]."""
    gate_up_FD = torch.zeros(2 * block.width, block.router_ED.shape[-1])
    down_DF = torch.zeros(block.router_ED.shape[-1], block.width)
    reference = group[0]
    for expert, share in zip(group, shares, strict=True):
        order_F = align(reference, expert) if align is not None and expert != reference else torch.arange(block.width)
        gate_up_FD += share * torch.cat([block.gate(expert)[order_F], block.up(expert)[order_F]])
        down_DF += share * block.down(expert)[:, order_F]
    return gate_up_FD, down_DF
