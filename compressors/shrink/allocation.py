"""Decides how many experts each layer keeps, and which ones no criterion may drop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from compressors.calibration.statistics import LayerStatistics
from compressors.model.errors import InputError
from compressors.shrink.prune import highest

__all__ = ["allocate_globally", "super_experts"]

_PERCENTILE = 99.5
_LARGEST_FRACTION = 1 / 10
_LAYER_FRACTION = 0.75


def allocate_globally(scores: Sequence[torch.Tensor], n_kept_total: int, minimum: int) -> list[int]:
    """Returns the number of experts that each layer keeps if the lowest scores of the whole model are dropped.

    Global pruning of He et al. (arXiv 2406.02500; ``global_pruning`` in the code of Unified-MoE-Compression): all
    layers' scores in one list, unscaled, as published. That compares like with like only for scores that mean the
    same in every layer: Expert Drop's and frequency's, which have the same sum in each, and the removal error, which is
    relative to the block's output. Scores made of output norms (EAN, REAP, MAN, MSAN) grow with the depth of most
    models and would empty the first layers: divide them by their layer's sum first. Unlike the published code, which
    may leave a layer no expert at all, no layer falls below ``minimum``: its lowest are passed over for the next
    lowest of other layers. Of equal scores the earlier layer and the lower index are kept.

    Args:
        scores: each layer's scores [E]; layers may differ in E.
        n_kept_total: experts left in all layers together.
        minimum: the fewest experts left in each layer: the model's top-k.

    Raises:
        InputError: a layer has fewer experts than ``minimum``, or ``n_kept_total`` is below ``minimum`` in each layer
            or above all experts.
    """
    sizes = [len(layer) for layer in scores]
    if not 1 <= minimum <= min(sizes):
        raise InputError(f"cannot keep at least {minimum} experts in each layer: give a number from 1 to {min(sizes)}")
    lowest = minimum * len(sizes)
    if not lowest <= n_kept_total <= sum(sizes):
        raise InputError(
            f"cannot keep {n_kept_total} experts in {len(sizes)} layers with at least {minimum} in each: "
            f"give a number from {lowest} to {sum(sizes)}"
        )
    safe = [highest(layer, minimum) for layer in scores]
    contested = [layer.index_fill(0, torch.tensor(kept), -torch.inf) for layer, kept in zip(scores, safe, strict=True)]
    winners = torch.zeros(sum(sizes), dtype=torch.int64)
    winners[list(highest(torch.cat(contested), n_kept_total - lowest))] = 1
    return [minimum + int(layer.sum()) for layer in winners.split(sizes)]


def super_experts(statistics: Iterable[LayerStatistics]) -> list[frozenset[int]]:
    """Finds each layer's experts whose activations are outliers of the whole model: no criterion should drop them.

    The rule of REAP's public code (``get_super_expert_indices``; the phenomenon: Su et al., arXiv 2507.23279): a
    maximum activation above both the 99.5th percentile of all experts of all layers and a tenth of the largest, in the
    first 75 % of the layers. The activation meant is the expert's ungated output, any element of it for any token that
    chose the expert. We take its magnitude, as the paper does: the code takes the maximum with its sign, and so misses
    outliers that are negative.

    A percentile is relative: even in a model without outliers about half a percent of the experts lie above it.
    """
    maxima = [layer.output_max_E for layer in statistics]
    everywhere = torch.cat(maxima)
    percentile = torch.quantile(everywhere, _PERCENTILE / 100)
    threshold = torch.maximum(percentile, everywhere.max() * _LARGEST_FRACTION)
    n_layers = int(len(maxima) * _LAYER_FRACTION)
    return [
        frozenset((maxima_E > threshold).nonzero()[:, 0].tolist()) if layer < n_layers else frozenset()
        for layer, maxima_E in enumerate(maxima)
    ]
