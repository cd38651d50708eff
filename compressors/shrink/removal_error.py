"""The pruning criterion that runs the block: the change of its output when an expert is gone.

Letters as in :mod:`compressors.model.description.spec`; R = K + 1 first choices.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from compressors.model.errors import UnsupportedError
from compressors.shrink.criteria import REMOVAL_ERROR
from compressors.shrink.moe_block import MoeBlock

__all__ = ["removal_error"]

_PIECE_BYTES = 256 * 2**20


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
