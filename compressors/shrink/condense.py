"""Condenses a layer's experts into one, for a dense student (:mod:`compressors.shrink.dense`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs
from compressors.shrink.prune import highest

__all__ = ["Condense"]


@dataclass(frozen=True)
class Condense:
    """Puts the neurons of the layer's top-k experts with the highest REAP scores side by side in one expert.

    A token's K gated experts become the same K for every token, together as wide as before: gate and up projections
    are stacked, down projections stand side by side, each times the expert's mean gate over the tokens that chose it,
    which is the expected gate (0 for an expert that no token chose). Of equal scores the lower index
    wins. "Every Expert Matters" (arXiv 2502.12947), whose methods teach such a student, takes a pretrained dense model
    instead and gives no initialisation.
    """

    needs: ClassVar[Needs] = Needs.WEIGHTS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """Returns the block with the one wide expert, which stands for the experts whose neurons it has."""
        statistics = evidence.statistics
        chosen = highest(statistics.reap_scores(), block.top_k)
        mean_gate_E = (statistics.gate_sum_E / statistics.count_E.clamp_min(1)).float()
        of_inputs = zip(*(block.input_matrices(expert) for expert in chosen), strict=True)
        gate_up_FD = torch.cat([matrix_FD for matrices in of_inputs for matrix_FD in matrices])
        down_DF = torch.cat([mean_gate_E[expert] * block.down(expert) for expert in chosen], dim=1)
        condensed = replace(block.keep(chosen[:1]), gate_up_EFD=gate_up_FD[None], down_EDF=down_DF[None])
        if block.gate_up_bias_EF is not None:
            gates_EF, ups_EF = block.gate_up_bias_EF[list(chosen)].chunk(2, dim=-1)
            condensed = replace(condensed, gate_up_bias_EF=torch.cat([gates_EF.flatten(), ups_EF.flatten()])[None])
        if block.down_bias_ED is not None:
            bias_D = mean_gate_E[list(chosen)] @ block.down_bias_ED[list(chosen)]
            condensed = replace(condensed, down_bias_ED=bias_D[None])
        return CompressedBlock(condensed, (chosen,), changed_experts=frozenset({0}))
