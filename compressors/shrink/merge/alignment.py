"""Neuron alignment: finds the order of an expert's intermediate neurons that fits another expert's best.

An expert computes the same function whatever the order of its neurons, but a mean of two experts' weights does not.
Finding the best order is a linear assignment problem (Ainsworth et al., "Git Re-Basin", arXiv 2209.04836).
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from compressors.shrink.merge.similarity import TOKENS_AT_ONCE
from compressors.shrink.moe_block import MoeBlock

__all__ = ["match_weights", "match_weights_and_activations"]


def match_weights(block: MoeBlock, reference: int, expert: int) -> torch.Tensor:
    """Weight matching: finds the order in which the expert's weights are nearest to the reference's in the L2 norm.

    This is the order of greatest inner product, over gate rows, up rows and down columns together (M-SMoE, arXiv
    2310.01334; UNITES-Lab/MC-SMoE, ``mcsmoe/merging/permutation.py``).

    Returns:
        int64 [F]: the expert's neuron that belongs beside each neuron of the reference.
    """
    products_FF = _neurons(block, reference) @ _neurons(block, expert).T
    return _assign(-products_FF)


def match_weights_and_activations(
    block: MoeBlock, inputs_TD: torch.Tensor, reference: int, expert: int
) -> torch.Tensor:
    """REAM's alignment: finds the order of least total distance between neurons, by weights and by activations.

    Both are vectors of length 1 for each neuron, one of its gate row, up row and down column, one of its activations
    for all the tokens; their distances are added (arXiv 2604.04356, section 4). The public code projects the weights
    on 64 principal components first, to save time; here they are whole.

    Returns:
        int64 [F]: the expert's neuron that belongs beside each neuron of the reference.
    """
    weight_cosines_FF = normalize(_neurons(block, reference)) @ normalize(_neurons(block, expert)).T
    activation_cosines_FF = _activation_cosines(block, inputs_TD, reference, expert)
    return _assign(_unit_distances(weight_cosines_FF) + _unit_distances(activation_cosines_FF))


def _neurons(block: MoeBlock, expert: int) -> torch.Tensor:
    """All weights of each neuron: float32 [F, 3 * D], or [F, 2 * D] without a gate."""
    return torch.cat([*block.input_matrices(expert), block.down(expert).T], dim=1)


def _activation_cosines(block: MoeBlock, inputs_TD: torch.Tensor, reference: int, expert: int) -> torch.Tensor:
    products_FF = torch.zeros(block.width, block.width)
    reference_squares_F, expert_squares_F = torch.zeros(block.width), torch.zeros(block.width)
    for inputs_nD in inputs_TD.split(TOKENS_AT_ONCE):
        reference_nF, expert_nF = block.hidden(reference, inputs_nD), block.hidden(expert, inputs_nD)
        products_FF += reference_nF.T @ expert_nF
        reference_squares_F += reference_nF.square().sum(0)
        expert_squares_F += expert_nF.square().sum(0)
    norms_FF = reference_squares_F.sqrt()[:, None] * expert_squares_F.sqrt()
    return products_FF / norms_FF.clamp_min(1e-30)


def _unit_distances(cosines_FF: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of unit vectors."""
    return (2 - 2 * cosines_FF).clamp_min(0).sqrt()


def _assign(cost_FF: torch.Tensor) -> torch.Tensor:
    from scipy.optimize import linear_sum_assignment  # takes long, which every process would wait for

    _, columns = linear_sum_assignment(cost_FF.numpy())
    return torch.from_numpy(columns)
