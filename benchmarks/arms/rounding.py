"""The 4-bit grid of the quantizing arms: 32 consecutive weights of a row share one scale, as in GGUF's Q4_0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compressors.model.errors import InputError
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs

__all__ = ["GROUP_SIZE", "RoundToNearest", "group_scales", "on_grid", "round_to_nearest"]

GROUP_SIZE = 32
_LOWEST, _HIGHEST = -8, 7  # 4 bits


def group_scales(weights_RN: torch.Tensor) -> torch.Tensor:
    """The scale of each group: the weight of largest magnitude becomes -8. [R, N / 32], 0 for a group of zeros.

    Raises:
        InputError: N is not a multiple of 32.
    """
    n_columns = weights_RN.shape[1]
    if n_columns % GROUP_SIZE:
        raise InputError(
            f"a matrix with {n_columns} inputs has no groups of {GROUP_SIZE}: "
            f"their number must be a multiple of {GROUP_SIZE}"
        )
    groups = weights_RN.reshape(len(weights_RN), -1, GROUP_SIZE)
    largest = groups.abs().argmax(-1, keepdim=True)
    return groups.gather(-1, largest)[..., 0] / _LOWEST


def on_grid(weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The nearest of a scale's 16 values to each weight; shapes broadcast."""
    steps = weights / torch.where(scales == 0, 1.0, scales)
    return steps.round().clamp(_LOWEST, _HIGHEST) * scales


def round_to_nearest(weights_RN: torch.Tensor) -> torch.Tensor:
    """Each weight rounded by itself, as [R, N] values of its group's grid.

    Raises:
        InputError: N is not a multiple of 32.
    """
    return on_grid(weights_RN, group_scales(weights_RN).repeat_interleave(GROUP_SIZE, dim=1))


@dataclass(frozen=True)
class RoundToNearest:
    """Rounding without looking at any input: what :class:`Gptq` and :class:`Awq` are compared with.

    Weights are dequantized float32, in torch; the containers gain nothing beyond their own quantization.
    """

    needs: ClassVar[Needs] = Needs.WEIGHTS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """The block with its experts on the grid.

        Raises:
            InputError: the hidden size or the width is not a multiple of 32.
        """
        rounded = [
            torch.stack([round_to_nearest(weights.float()) for weights in matrices])
            for matrices in (block.gate_up_EFD, block.down_EDF)
        ]
        return CompressedBlock.rewritten(block, *rounded)
