"""Replaces each group by one expert: the weighted mean of its members."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from compressors.model.errors import InputError
from compressors.shrink.moe_block import CompressedBlock, MoeBlock

__all__ = ["Alignment", "merge_groups", "ordered", "require_possible"]

Alignment = Callable[[int, int], torch.Tensor]
"""``align(reference, expert)``: the expert's neuron for each neuron of the reference, int64 [F]."""


def require_possible(n_experts: int, block: MoeBlock) -> None:
    """Checks a number of experts to merge into.

    Raises:
        InputError: the number is not between 1 and the block's number of experts.
    """
    if not 1 <= n_experts <= block.n_experts:
        raise InputError(
            f"cannot merge {block.n_experts} experts into {n_experts}: give a number from 1 to all of them"
        )


def ordered(groups: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Sorts groups as a compressed block lists them: by their first members, with the other members ascending."""
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
        weights_E: the weight of each expert: usage or saliency, not negative.
        align: orders the neurons of a group's other members like its first member's; None: they stay as they are.
        average_router: True if the router row is the members' weighted mean, not the first member's row.
    """
    merged = block.keep([group[0] for group in groups])
    changed = frozenset(index for index, group in enumerate(groups) if len(group) > 1)
    for index in changed:
        group = groups[index]
        shares = _shares(weights_E, group)
        # `keep` made copies, so the given block does not change
        _average(merged, index, block, group, shares, align)
        if average_router:
            for mean_E, tensor_E in _router_tensors(merged, block):
                mean_E[index] = torch.tensor(shares) @ tensor_E[list(group)]
    return CompressedBlock(merged, groups, changed, router_changed=average_router and bool(changed))


def _shares(weights_E: torch.Tensor, group: Sequence[int]) -> list[float]:
    weights = weights_E[list(group)].double()
    if not weights.any():
        weights = torch.ones_like(weights)
    return [float(share) for share in weights / weights.sum()]


def _router_tensors(merged: MoeBlock, block: MoeBlock) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the router and each bias that it has, after and before merging."""
    for name in ("router_ED", "router_bias_E", "selection_bias_E"):
        if getattr(block, name) is not None:
            yield getattr(merged, name), getattr(block, name)


def _average(
    merged: MoeBlock,
    index: int,
    block: MoeBlock,
    group: Sequence[int],
    shares: Sequence[float],
    align: Alignment | None,
) -> None:
    """Makes the ``index``-th merged expert the weighted mean of a group, biases included; sums are float32.

    Experts' scales are averaged too. As a scale multiplies its expert's output, the outputs' matrices and biases are
    averaged as if it were in them.
    """
    reference, same_F = group[0], torch.arange(block.width)
    of_outputs = list(shares)
    if merged.expert_scale_E is not None and (scale_E := block.expert_scale_E) is not None:
        mean = torch.tensor(shares) @ scale_E[list(group)]
        merged.expert_scale_E[index] = mean
        if mean:  # else nothing is left of them in any case
            of_outputs = [share * float(scale_E[e] / mean) for share, e in zip(shares, group, strict=True)]
    orders = [align(reference, expert) if align and expert != reference else same_F for expert in group]
    members = [
        # the last orders the rows of gate and up
        (share, expert, order_F, torch.cat([matrix * block.width + order_F for matrix in range(block.n_inputs)]))
        for share, expert, order_F in zip(shares, group, orders, strict=True)
    ]
    merged.gate_up_EFD[index] = _sum(share * block.gate_up_EFD[e].float()[rows] for share, e, _, rows in members)
    outputs = list(zip(of_outputs, members, strict=True))
    merged.down_EDF[index] = _sum(share * block.down(e)[:, order_F] for share, (_, e, order_F, _) in outputs)
    if merged.gate_up_bias_EF is not None and (gate_up_EF := block.gate_up_bias_EF) is not None:
        merged.gate_up_bias_EF[index] = _sum(share * gate_up_EF[e, rows] for share, e, _, rows in members)
    if merged.down_bias_ED is not None and (down_ED := block.down_bias_ED) is not None:
        merged.down_bias_ED[index] = _sum(share * down_ED[e] for share, (_, e, _, _) in outputs)


def _sum(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    return sum(terms, torch.zeros(()))
