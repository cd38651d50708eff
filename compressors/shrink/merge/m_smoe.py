"""M-SMoE: experts join the often used expert that the router treats most alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from compressors.shrink.merge.alignment import match_weights
from compressors.shrink.merge.average import merge_groups, ordered, require_possible
from compressors.shrink.merge.similarity import router_logit_cosines
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs
from compressors.shrink.prune import survivors

__all__ = ["MSMoE"]


@dataclass(frozen=True)
class MSMoE:
    """Merges by usage and router logits: Li et al., "Merge, Then Compress" (arXiv 2310.01334), without its training.

    The ``n_experts`` most used experts are dominant. Each other one joins the dominant expert of highest
    (cos(logits) + 1) / 2, its neurons are aligned to the dominant expert's by weight matching, and a group becomes the
    mean weighted by usage. The router row is that mean of the members' rows; as published, all rows stay as aliases
    of the merged expert.

    As published, dominant experts are chosen by usage over all layers together, so layers keep different numbers.
    Here the number of each layer is given. Where the router chooses groups of experts first, each group has equally
    many dominant experts.

    Raises (when called):
        InputError: ``n_experts`` is not between 1 and the block's number of experts.
    """

    n_experts: int
    needs: ClassVar[Needs] = Needs.WEIGHTS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """Merges a block's experts; of equally used or equally similar experts the lower index wins."""
        require_possible(self.n_experts, block)
        usage_E = evidence.statistics.count_E
        similarity_EE = (router_logit_cosines(evidence.statistics) + 1) / 2
        groups = _join_dominant(similarity_EE, survivors(block, usage_E, self.n_experts))
        return merge_groups(block, groups, usage_E, align=partial(match_weights, block), average_router=True)


def _join_dominant(similarity_EE: torch.Tensor, dominant: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    groups = {expert: [expert] for expert in dominant}
    for expert in range(len(similarity_EE)):
        if expert not in groups:
            nearest = int(similarity_EE[expert, list(dominant)].argmax())
            groups[dominant[nearest]].append(expert)
    return ordered(groups.values())
