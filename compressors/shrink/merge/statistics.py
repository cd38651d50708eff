"""Derives the statistics of merged experts from those of the layer before merging."""

from __future__ import annotations

import torch

from compressors.calibration.statistics import LayerStatistics

__all__ = ["merged_statistics"]

_SUMS = (
    "count_E",
    "gate_sum_E",
    "norm_sum_E",
    "gate_norm_sum_E",
    "norm_square_sum_E",
    "output_sum_ED",
    "gate_up_input_square_ED",
    "router_probability_sum_E",
)
_MAXIMA = ("norm_max_E", "output_max_E")


def merged_statistics(statistics: LayerStatistics, groups: tuple[tuple[int, ...], ...]) -> LayerStatistics:
    """Computes statistics of merged experts from their members', for importance matrices without another measurement.

    A merged expert is assumed to get all tokens of its members, and to answer as they do: sums add up and maxima are
    the largest. Only its first member describes its neurons, because methods reorder those of the others: the mean
    square of the inputs of the down projection is that member's, for all the group's tokens. So are router logits.

    Args:
        statistics: the statistics of the layer before merging.
        groups: [G], the groups of :class:`~compressors.shrink.moe_block.CompressedBlock`.

    Returns:
        The same fields for G experts; fields that do not depend on experts are unchanged.
    """
    members = [list(group) for group in groups]
    origins = [group[0] for group in groups]
    sums = {name: torch.stack([getattr(statistics, name)[group].sum(0) for group in members]) for name in _SUMS}
    maxima = {name: torch.stack([getattr(statistics, name)[group].amax(0) for group in members]) for name in _MAXIMA}
    tokens_per_token_of_origin_G = sums["count_E"] / statistics.count_E[origins].clamp_min(1)
    of_origins = {
        "down_input_square_EF": statistics.down_input_square_EF[origins] * tokens_per_token_of_origin_G[:, None],
        "router_logit_gram_EE": statistics.router_logit_gram_EE[origins][:, origins],
    }
    return LayerStatistics.from_tensors(statistics.tensors | sums | maxima | of_origins)
