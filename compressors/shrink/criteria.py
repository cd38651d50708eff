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

import torch
from torch.nn import functional

from compressors.calibration.statistics import LayerStatistics
from compressors.model.errors import UnsupportedError
from compressors.shrink.moe_block import MoeBlock

__all__ = ["CRITERIA", "CRITERION_NAMES", "REMOVAL_ERROR", "Criterion", "removal_error"]

Criterion = Callable[[LayerStatistics], torch.Tensor]
"""Scores of one layer's experts: float64 [E]."""

_PIECE_BYTES = 256 * 2**20


def _frequency(statistics: LayerStatistics) -> torch.Tensor:
    """Tokens that chose the expert, |T_e|."""
    return statistics.count_E


def _gate_frequency(statistics: LayerStatistics) -> torch.Tensor:
    """Sum over T_e of g: ``weighted_expert_frequency_sum`` in the public code of REAP."""
    return statistics.gate_sum_E


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
        "reap": LayerStatistics.reap_scores,
        "man": _mean_activation_norm,
        "msan": _mean_squared_activation_norm,
        "expert-drop": _expert_drop,
    }
)
"""Published name -> scores from statistics."""

REMOVAL_ERROR = "removal-error"
"""The criterion that needs the block and inputs: :func:`removal_error`."""

CRITERION_NAMES = (*CRITERIA, REMOVAL_ERROR)
"""Every criterion by which experts can be pruned."""


def removal_error(
    block: MoeBlock, inputs_TD: torch.Tensor, router_inputs_TD: torch.Tensor | None = None
) -> torch.Tensor:
    """Measures how the block's output changes if an expert is gone and its tokens go to their next choice: float64 [E].

    For expert e: the sum over T_e of ||y - y_without_e||^2, divided by the sum over all tokens of ||y||^2. For
    y_without_e the expert's logit is minus infinity, so that top-k and gates are those of a model without it; where
    every expert is chosen there is no next choice, and the others share its gate as the model would share it. In one
    layer this ranks experts as NVIDIA Model-Optimizer's ``RemoveExpertsIndependentHook`` does (mean squared error
    times the share of displaced tokens); relative to the output, layers can be compared too.

    Args:
        block: the layer's experts and router.
        inputs_TD: float32, the inputs of the experts.
        router_inputs_TD: float32, those of the router; None: the same.

    Raises:
        UnsupportedError: the router chooses groups of experts first, so a token's next choice is not known.
    """
    if block.routing.n_groups > 1:
        raise UnsupportedError(
            f"{REMOVAL_ERROR}: the router chooses groups of experts first, and without an expert a token's next choice "
            "may be of another group: take another criterion, such as reap"
        )
    if block.n_experts == 1:  # nothing is left without it: the change is the output itself
        return torch.ones(1, dtype=torch.float64)
    change_E = torch.zeros(block.n_experts, dtype=torch.float64)
    output_square = torch.zeros((), dtype=torch.float64)
    n_choices = min(block.top_k + 1, block.n_experts)
    of_router_TD = inputs_TD if router_inputs_TD is None else router_inputs_TD
    n_at_once = max(1, _PIECE_BYTES // (4 * n_choices * inputs_TD.shape[1]))
    for piece_TD, of_router in zip(inputs_TD.split(n_at_once), of_router_TD.split(n_at_once), strict=True):
        logits_TE = block.logits(of_router)
        ranked_TR = _ranked(block, logits_TE, n_choices)
        outputs_TRD = _outputs_of_choices(block, piece_TD, ranked_TR)
        gates_TR = functional.pad(block.gates(logits_TE, ranked_TR[:, : block.top_k]), (0, n_choices - block.top_k))
        output_square += _weighted_sum(gates_TR, outputs_TRD).square().sum(dtype=torch.float64)
        for dropped_T1 in ranked_TR[:, : block.top_k].split(1, dim=1):
            # the same outputs with other gates, 0 for the dropped expert: the experts need not run again
            change_TR = gates_TR - block.gates(logits_TE.scatter(1, dropped_T1, -torch.inf), ranked_TR)
            square_T = _weighted_sum(change_TR, outputs_TRD).square().sum(-1, dtype=torch.float64)
            change_E.index_add_(0, dropped_T1[:, 0], square_T)
    return change_E / output_square.clamp_min(1e-30)


def _ranked(block: MoeBlock, logits_TE: torch.Tensor, n_choices: int) -> torch.Tensor:
    """Each token's first choices, int64 [T, R]: without a selection bias, the largest logits."""
    if block.selection_bias_E is None:
        return logits_TE.topk(n_choices, dim=-1).indices
    return block.routing.torch_choose(logits_TE, n_choices, block.selection_bias_E)


def _outputs_of_choices(block: MoeBlock, inputs_TD: torch.Tensor, ranked_TR: torch.Tensor) -> torch.Tensor:
    """Each token's outputs of its first choices: float32 [T, R, D]; an expert is run once, on its tokens only."""
    outputs_TRD = torch.empty(*ranked_TR.shape, inputs_TD.shape[1], dtype=torch.float32)
    for expert in range(block.n_experts):
        tokens, ranks = (ranked_TR == expert).nonzero(as_tuple=True)
        outputs_TRD[tokens, ranks] = block.output(expert, inputs_TD[tokens])
    return outputs_TRD


def _weighted_sum(weights_TR: torch.Tensor, outputs_TRD: torch.Tensor) -> torch.Tensor:
    """Sum over a token's choices: float32 [T, D]."""
    return torch.bmm(weights_TR[:, None, :], outputs_TRD)[:, 0]
