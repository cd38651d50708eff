"""Dropping experts: every layer keeps those with the highest scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressors.model.errors import InputError
from compressors.model.student import ExpertMap
from compressors.statistics import LayerStatistics

__all__ = ["highest", "prune_by_reap"]


def prune_by_reap(layers: Sequence[LayerStatistics], n_experts: int) -> ExpertMap:
    """Keeps in each layer the ``n_experts`` experts of highest REAP saliency, in index order (arXiv 2510.13999).

    Raises:
        InputError: ``n_experts`` is not between 1 and the teacher's count.
    """
    n_teacher_experts = len(layers[0].count_E)
    if not 1 <= n_experts <= n_teacher_experts:
        raise InputError(f"cannot keep {n_experts} experts of {n_teacher_experts}: give a number between the two")
    return ExpertMap(n_teacher_experts, tuple(highest(layer.reap_scores(), n_experts) for layer in layers))


def highest(scores_E: torch.Tensor, n_experts: int) -> tuple[int, ...]:
    """Indices of the ``n_experts`` highest scores, ascending; of equal scores the lower index wins."""
    order = torch.argsort(scores_E, descending=True, stable=True)
    return tuple(sorted(order[:n_experts].tolist()))
