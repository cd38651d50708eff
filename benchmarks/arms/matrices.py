"""Changes each matrix of each expert, given the moments of its inputs.

Letters as in :mod:`compressors.shrink.moe_block`; a matrix has R rows (outputs) and N columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock

__all__ = ["Calibrate", "Change", "change_matrices"]

Change = Callable[[torch.Tensor], torch.Tensor]
"""A matrix [R, N] to the one that replaces it."""

Calibrate = Callable[[torch.Tensor], Change]
"""Inputs [n, N] to the change of every matrix that has these inputs."""


def change_matrices(block: MoeBlock, evidence: Evidence, calibrate: Calibrate) -> CompressedBlock:
    """The block with every gate, up and down projection changed, expert by expert, as float32.

    Gate and up are calibrated on the sample tokens that chose the expert, down on the unchanged expert's hidden
    activations of these tokens: [0, N] for an expert that no sample token chose.
    """
    routes = block.route(evidence.sample_TD)
    gate_up_EFD = torch.empty(block.gate_up_EFD.shape, dtype=torch.float32)
    down_EDF = torch.empty(block.down_EDF.shape, dtype=torch.float32)
    for expert in range(block.n_experts):
        inputs_nD = evidence.sample_TD[routes.of_expert(expert)[0]]
        change = calibrate(inputs_nD)
        gate_up_EFD[expert] = torch.cat([change(block.gate(expert)), change(block.up(expert))])
        down_EDF[expert] = calibrate(block.hidden(expert, inputs_nD))(block.down(expert))
    return CompressedBlock.rewritten(block, gate_up_EFD, down_EDF)
