"""Groups the experts that are replaced: those of a group share a base."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressors.shrink.merge.similarity import output_cosines, router_logit_cosines
from compressors.shrink.moe_block import Evidence, MoeBlock

__all__ = ["by_number", "by_similarity"]


def by_similarity(
    block: MoeBlock, evidence: Evidence, experts: Sequence[int], n_groups: int
) -> tuple[tuple[int, ...], ...]:
    """Clusters experts that the router treats alike and that answer alike, hierarchically, with none alone.

    The similarity is REAM's (arXiv 2604.04356, equations 5, 7 and 8): the mean of the cosines of two experts' router
    logits and of their outputs. The two clusters of the highest mean similarity join first (average linkage), but none
    may grow so large that the others could not have two members each.

    Args:
        block: all experts of the layer.
        evidence: statistics, and inputs of sample tokens.
        experts: those to group.
        n_groups: the number of groups, at most half of the experts'.

    Returns:
        The groups, each ascending, by their first members.
    """
    cosines_EE = (router_logit_cosines(evidence.statistics) + output_cosines(block, evidence.sample_TD)) / 2
    clusters = [[expert] for expert in sorted(experts)]
    while len(clusters) > n_groups:
        joins = [(i, j) for j in range(len(clusters)) for i in range(j) if _may_join(clusters, i, j, n_groups)]
        i, j = max(joins, key=lambda join: float(cosines_EE[clusters[join[0]]][:, clusters[join[1]]].mean()))
        clusters[i] += clusters.pop(j)
    return tuple(sorted(tuple(sorted(cluster)) for cluster in clusters))


def _may_join(clusters: Sequence[Sequence[int]], i: int, j: int, n_groups: int) -> bool:
    """True if what is left after a join can still become so many groups of two or more."""
    sizes = [len(cluster) for number, cluster in enumerate(clusters) if number not in (i, j)]
    return 1 + sum(size > 1 for size in sizes) + sizes.count(1) // 2 >= n_groups


def by_number(experts: Sequence[int], n_groups: int) -> tuple[tuple[int, ...], ...]:
    """Groups neighbours, as evenly as possible: for comparison."""
    parts = torch.tensor(sorted(experts)).tensor_split(n_groups)
    return tuple(tuple(part.tolist()) for part in parts)
