"""Decides how many experts of each layer are replaced.

LightMoE's formula is not public (Hao et al., arXiv 2603.12645): what is known is that each layer has a threshold of its
own. Ours follows from one rule: the experts that change the hidden states least are replaced, whatever their layer. An
expert's part of that change is

    (1 - mean over all tokens of cos(x, x + MoE(norm(x)))) * sum over T_e of g ||f|| / sum over all e' of the same,

with T_e the tokens that chose the expert, g its gate and f its output there, and x the states that enter the layer's
feed-forward. So a layer that turns the states keeps its experts, as the first layer of both trained models does, and
one whose outputs are small beside the states gives many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressors.calibration.statistics import LayerStatistics
from compressors.model.errors import InputError
from compressors.shrink.drop import moe_similarities
from compressors.shrink.replace.counts import FEWEST_ON_A_BASE

__all__ = ["contributions", "parts_of_change", "replaced_by_layer"]


def contributions(statistics: LayerStatistics) -> torch.Tensor:
    """Each expert's share of what its layer's experts add up to: the sum of g ||f|| over its tokens, float64 [E].

    The shares of a layer have the sum 1; all are alike if no token came by.
    """
    sums_E = statistics.gate_norm_sum_E
    return sums_E / sums_E.sum() if sums_E.sum() > 0 else torch.full_like(sums_E, 1 / len(sums_E))


def parts_of_change(statistics: Sequence[LayerStatistics]) -> list[torch.Tensor]:
    """Each expert's part of the change of the hidden states in its layer, as above: float64 [E] for each layer."""
    changes_L = 1 - moe_similarities(statistics)
    return [change * contributions(layer) for change, layer in zip(changes_L, statistics, strict=True)]


def replaced_by_layer(statistics: Sequence[LayerStatistics], n_replaced: int, n_bases: int) -> list[int]:
    """The number of experts that each layer replaces: those with the least parts of the change.

    A layer replaces none or at least two, and as many bases as there are find two experts each: where the least parts
    leave too few pairs, layers with odd numbers give one expert to one another. Of equal parts the earlier layer and
    the lower index go first.

    Args:
        statistics: each layer's.
        n_replaced: the experts that are replaced in all layers together.
        n_bases: the bases that they stand on.

    Raises:
        InputError: there are not so many experts, or too few for two in a layer.
    """
    sizes = [len(layer.count_E) for layer in statistics]
    if not FEWEST_ON_A_BASE <= n_replaced <= sum(sizes):
        raise InputError(
            f"{n_replaced} of {sum(sizes)} experts cannot be replaced: give a number from {FEWEST_ON_A_BASE} to "
            f"{sum(sizes)}"
        )
    least_first = torch.cat(parts_of_change(statistics)).argsort(stable=True)
    layer_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    counts = torch.bincount(layer_of[least_first[:n_replaced]], minlength=len(sizes)).tolist()
    return _in_pairs(_without_ones(counts, sizes), sizes, n_bases)


def _without_ones(counts: list[int], sizes: Sequence[int]) -> list[int]:
    """Gives layers with a single replaced expert one more, from the layers that have most, or takes it from them."""
    while 1 in counts:
        lonely = counts.index(1)
        spare = max(range(len(counts)), key=lambda layer: counts[layer])
        if counts[spare] > FEWEST_ON_A_BASE and sizes[lonely] > 1:
            counts[lonely], counts[spare] = FEWEST_ON_A_BASE, counts[spare] - 1
        else:
            taker = next(layer for layer in range(len(counts)) if 1 < counts[layer] < sizes[layer])
            counts[lonely], counts[taker] = 0, counts[taker] + 1
    return counts


def _in_pairs(counts: list[int], sizes: Sequence[int], n_bases: int) -> list[int]:
    """Moves experts between layers with odd numbers of them until there are so many pairs, or no more can be had."""
    while sum(count // FEWEST_ON_A_BASE for count in counts) < n_bases:
        odd = [layer for layer, count in enumerate(counts) if count % FEWEST_ON_A_BASE]
        taker = next((layer for layer in odd if counts[layer] < sizes[layer]), None)
        if taker is None or len(odd) < FEWEST_ON_A_BASE:
            break
        giver = max((layer for layer in odd if layer != taker), key=lambda layer: counts[layer])
        counts[taker], counts[giver] = counts[taker] + 1, counts[giver] - 1
    return counts
