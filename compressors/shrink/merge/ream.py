"""REAM: the most salient experts take in the ones most like them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from compressors.model.errors import InputError
from compressors.shrink.merge.alignment import match_weights_and_activations
from compressors.shrink.merge.average import merge_groups, ordered, require_possible
from compressors.shrink.merge.similarity import output_cosines, router_logit_cosines
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs
from compressors.shrink.prune import survivors

__all__ = ["REAM"]


@dataclass(frozen=True)
class REAM:
    """Merges by REAP saliency: Jha et al., "REAM: Merging Improves Pruning of Experts in LLMs" (arXiv 2604.04356).

    The ``n_experts`` experts of highest REAP score are centroids. From the most salient one on, each takes the most
    similar experts that are still free, until its group has ``group_size``; so a few groups are large, and most
    centroids stay alone. Two experts are as similar as the mean of their router logits' cosine and of their outputs'
    mean cosine, both mapped to [0, 1]. Neurons are aligned to the centroid's by weights and activations; a group
    becomes the mean weighted by saliency, and keeps the centroid's router row. An expert that no token chose has no
    saliency: it joins a group, and adds nothing.

    No expert is left over: if the groups cannot hold all experts, the number is refused, as
    in the public code (SamsungSAILMontreal/ream). The similarity is that of equations 5, 7 and 8 as independent
    implementations quote them. The public code instead compares the outputs' means over the tokens, and scales the
    gates' distances by the largest in the layer; it also gives experts that no token chose the least saliency of the
    others.
    Where the router chooses groups of experts first, each group has equally many centroids. The stage that calls the
    method computes the inputs of the following layers again.

    Raises (when called):
        InputError: ``n_experts`` is not between 1 and the block's number of experts, or too small for ``group_size``.
    """

    n_experts: int
    group_size: int = 16  # C of the paper, the centroid included
    needs: ClassVar[Needs] = Needs.INPUTS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """Merges a block's experts; of equally salient or equally similar experts the lower index wins."""
        require_possible(self.n_experts, block)
        if self.n_experts * self.group_size < block.n_experts:
            raise InputError(
                f"cannot merge {block.n_experts} experts into {self.n_experts} groups of at most {self.group_size}: "
                f"REAM needs at least {-(-block.n_experts // self.group_size)}"
            )
        saliency_E = evidence.statistics.reap_scores()
        cosines_EE = (router_logit_cosines(evidence.statistics) + output_cosines(block, evidence.sample_TD)) / 2
        centroids = set(survivors(block, saliency_E, self.n_experts))
        salient_first = [e for e in saliency_E.argsort(descending=True, stable=True).tolist() if e in centroids]
        groups = _walk((cosines_EE + 1) / 2, salient_first, self.group_size)
        align = partial(match_weights_and_activations, block, evidence.sample_TD)
        return merge_groups(block, groups, saliency_E, align=align, average_router=False)


def _walk(similarity_EE: torch.Tensor, centroids: Sequence[int], group_size: int) -> tuple[tuple[int, ...], ...]:
    free = set(range(len(similarity_EE))) - set(centroids)
    groups = []
    for centroid in centroids:
        nearest = similarity_EE[centroid].argsort(descending=True, stable=True).tolist()
        taken = [expert for expert in nearest if expert in free][: group_size - 1]
        free -= set(taken)
        groups.append([centroid, *taken])
    return ordered(groups)
