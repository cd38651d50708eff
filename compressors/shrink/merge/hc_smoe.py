"""HC-SMoE: experts that answer alike on average are clustered hierarchically."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compressors.shrink.merge.average import merge_groups, ordered, require_possible
from compressors.shrink.merge.similarity import mean_outputs
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs

__all__ = ["HCSMoE"]


@dataclass(frozen=True)
class HCSMoE:
    """Merges by mean outputs: Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering".

    arXiv 2410.08589. An expert's feature is its mean output over all sample tokens, routed to it or not; clusters are
    joined by Euclidean distances and average linkage. A cluster becomes the mean weighted by usage, without aligning
    neurons, and its router row the same mean of the members' rows; as published, all rows stay as aliases of it. Where
    the router chooses groups of experts first, clusters rarely leave groups of equal size; others are refused.
    The public scripts misspell the name of this clustering and run k-means instead; that is not reproduced.

    Raises (when called):
        InputError: ``n_experts`` is not between 1 and the block's number of experts.
    """

    n_experts: int
    needs: ClassVar[Needs] = Needs.INPUTS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """Merges a block's experts; a cluster's most used expert, of equals the lowest, is the one it comes from."""
        require_possible(self.n_experts, block)
        usage_E = evidence.statistics.count_E
        clusters = _clusters(mean_outputs(block, evidence.sample_TD), self.n_experts)
        groups = ordered(sorted(cluster, key=lambda expert: (-float(usage_E[expert]), expert)) for cluster in clusters)
        return merge_groups(block, groups, usage_E, average_router=True)


def _clusters(features_ED: torch.Tensor, n_clusters: int) -> list[list[int]]:
    """Agglomerative clustering: the two nearest clusters are joined until ``n_clusters`` are left."""
    from scipy.cluster.hierarchy import linkage  # takes a second, which every process would wait for

    n_experts = len(features_ED)
    clusters = {expert: [expert] for expert in range(n_experts)}
    if n_clusters < n_experts:
        joins = linkage(features_ED.numpy(), method="average", metric="euclidean")
        # scipy numbers the cluster that a join makes after all that were there before
        for join, (first, second) in enumerate(joins[: n_experts - n_clusters, :2].astype(int)):
            clusters[n_experts + join] = clusters.pop(first) + clusters.pop(second)
    return list(clusters.values())
