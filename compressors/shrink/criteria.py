"""The published pruning criteria, which score experts: the higher the score, the later an expert is dropped.

All but one come from :class:`~compressors.calibration.statistics.LayerStatistics`, sums of one calibration pass; the
removal error has to run the block. T_e are the tokens that chose expert e, g its gate and f its output; gates are the
ones that multiply the outputs, so a bias that only selects experts has no part in any score. An expert that no
token chose scores 0 (in ``expert-drop``: little). Letters as in :mod:`compressors.model.description.spec`; R = K + 1
first choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from compressors.calibration.statistics import LayerStatistics

__all__ = ["CRITERIA", "CRITERION_NAMES", "REMOVAL_ERROR", "Criterion"]

Criterion = Callable[["LayerStatistics"], "torch.Tensor"]
"""Scores of one layer's experts: float64 [E]."""


def _frequency(statistics: LayerStatistics) -> torch.Tensor:
    """Tokens that chose the expert, |T_e|."""
    return statistics.count_E


def _gate_frequency(statistics: LayerStatistics) -> torch.Tensor:
    """Sum over T_e of g: ``weighted_expert_frequency_sum`` in the public code of REAP."""
    return statistics.gate_sum_E


def _reap(statistics: LayerStatistics) -> torch.Tensor:
    """REAP, the mean over T_e of g ||f||: Lasby et al. (arXiv 2510.13999)."""
    return statistics.reap_scores()


def _expert_activation_norm(statistics: LayerStatistics) -> torch.Tensor:
    """EAN, the sum over T_e of ||f||: Jaiswal et al. (arXiv 2504.05586); ``ean_sum`` in the public code of REAP."""
    return statistics.norm_sum_E


def _mean_activation_norm(statistics: LayerStatistics) -> torch.Tensor:
    """MAN, the mean over T_e of ||f|| (arXiv 2606.15716)."""
    return statistics.norm_sum_E / statistics.count_E.clamp_min(1)


def _mean_squared_activation_norm(statistics: LayerStatistics) -> torch.Tensor:
    """MSAN, the mean over T_e of ||f||^2 (arXiv 2606.15716)."""
    return statistics.norm_square_sum_E / statistics.count_E.clamp_min(1)


def _expert_drop(statistics: LayerStatistics) -> torch.Tensor:
    """Expert Drop: the mean over all tokens of the router's probability, chosen or not (He et al., 2406.02500)."""
    return statistics.router_probability_sum_E / statistics.n_tokens.clamp_min(1)


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "frequency": _frequency,
        "gate-frequency": _gate_frequency,
        "ean": _expert_activation_norm,
        "reap": _reap,
        "man": _mean_activation_norm,
        "msan": _mean_squared_activation_norm,
        "expert-drop": _expert_drop,
    }
)
"""Published name -> scores from statistics."""

REMOVAL_ERROR = "removal-error"
"""The criterion that needs the block and inputs: :func:`compressors.shrink.removal_error.removal_error`."""

CRITERION_NAMES = (*CRITERIA, REMOVAL_ERROR)
"""Every criterion by which experts can be pruned."""
