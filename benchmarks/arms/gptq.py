"""GPTQ: weights are rounded column by column, and the columns after them make up for the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.arms.column_sweep import inverse_factor, sweep
from benchmarks.arms.matrices import Change, change_matrices
from benchmarks.arms.rounding import GROUP_SIZE, group_scales, on_grid
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs

__all__ = ["Gptq"]


@dataclass(frozen=True)
class Gptq:
    """Frantar et al., "GPTQ" (arXiv 2210.17323), 4 bits in symmetric groups of 32, columns in their order.

    A group's scale is chosen when the sweep reaches it, from weights that all earlier columns have corrected. The
    public code's takes them from before the current block of columns where groups are smaller than that, which is not
    done here. An expert that no sample token chose is rounded to nearest. For comparison, in torch: weights are
    dequantized float32, and the containers gain nothing beyond their own quantization.
    """

    needs: ClassVar[Needs] = Needs.INPUTS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """The block with its experts on the 4-bit grid.

        Raises:
            InputError: the hidden size or the width is not a multiple of 32.
        """
        return change_matrices(block, evidence, _calibrate)


def _calibrate(inputs_nN: torch.Tensor) -> Change:
    factor_NN = inverse_factor(inputs_nN)

    def change(weights_RN: torch.Tensor) -> torch.Tensor:
        scales = group_scales(weights_RN).double()  # [R, N / 32]

        def settle(current_RN: torch.Tensor, column: int) -> torch.Tensor:
            group = column // GROUP_SIZE
            if column % GROUP_SIZE == 0:
                scales[:, [group]] = group_scales(current_RN[:, column : column + GROUP_SIZE])
            return on_grid(current_RN[:, column], scales[:, group])

        return sweep(weights_RN, factor_NN, settle)

    return change
