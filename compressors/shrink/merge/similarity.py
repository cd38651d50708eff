"""Similarities of experts: by the router's logits, and by their outputs for the same tokens."""

from __future__ import annotations

import torch

from compressors.calibration.statistics import LayerStatistics
from compressors.shrink.moe_block import MoeBlock

__all__ = ["TOKENS_AT_ONCE", "mean_outputs", "output_cosines", "router_logit_cosines"]

TOKENS_AT_ONCE = 2048
_VALUES_AT_ONCE = 2**26  # values of outputs that are held together: 256 MiB in float32


def router_logit_cosines(statistics: LayerStatistics) -> torch.Tensor:
    """Cosine of two experts' router logits, each a vector over all calibration tokens: float64 [E, E]."""
    gram_EE = statistics.router_logit_gram_EE
    norms_E = gram_EE.diagonal().sqrt().clamp_min(1e-30)
    return gram_EE / (norms_E[:, None] * norms_E)


def output_cosines(block: MoeBlock, inputs_TD: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of the cosine of two experts' outputs; every expert sees every token: float64 [E, E].

    Gates do not matter: they are positive and scale an output without turning it.
    """
    hidden_size = inputs_TD.shape[-1]
    n_tokens = max(1, _VALUES_AT_ONCE // (block.n_experts * hidden_size))
    cosine_sum_EE = torch.zeros(block.n_experts, block.n_experts, dtype=torch.float64)
    for inputs_nD in inputs_TD.split(n_tokens):
        units_EX = torch.empty(block.n_experts, inputs_nD.numel())  # X = n * D: the product below sums over tokens too
        for expert in range(block.n_experts):
            units_EX[expert] = torch.nn.functional.normalize(block.output(expert, inputs_nD), dim=-1).flatten()
        cosine_sum_EE += units_EX @ units_EX.T
    return cosine_sum_EE / len(inputs_TD)


def mean_outputs(block: MoeBlock, inputs_TD: torch.Tensor) -> torch.Tensor:
    """Mean ungated output of each expert over all the tokens, routed to it or not: float64 [E, D]."""
    sums_ED = torch.zeros(block.n_experts, inputs_TD.shape[-1], dtype=torch.float64)
    for expert in range(block.n_experts):
        for inputs_nD in inputs_TD.split(TOKENS_AT_ONCE):
            sums_ED[expert] += block.output(expert, inputs_nD).sum(0)
    return sums_ED / len(inputs_TD)
