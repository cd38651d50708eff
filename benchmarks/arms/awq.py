"""AWQ: input channels that are large are scaled up before rounding, so that they lose less of their precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.arms.matrices import Change, change_matrices
from benchmarks.arms.rounding import round_to_nearest
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs, second_moment

__all__ = ["Awq"]

_GRID = tuple(step / 20 for step in range(21))
_SMALLEST_MEAN = 1e-4  # of the largest channel's: a channel that is never used is not scaled to nothing


@dataclass(frozen=True)
class Awq:
    """Lin et al., "AWQ" (arXiv 2306.00978), section 3.2: 4 bits in symmetric groups of 32.

    Input channel j of a matrix is scaled by s_j = mean|x_j|^alpha before rounding, and back after it: W' = Q(W s) / s.
    Of alpha 0, 0.05 ... 1 each matrix takes the one whose output error on the sample is least, the lowest of equals;
    alpha 0 is rounding to nearest. Running models fold 1 / s into what comes before, which gate and up cannot have:
    one norm feeds the router and all experts, and each expert has scales of its own. So W' is given dequantized, as
    float32, and is on no 4-bit grid itself. The public code's search for clipped ranges is not part of it. An expert
    that no sample token chose is rounded to nearest. For comparison, in torch: the containers gain nothing.
    """

    needs: ClassVar[Needs] = Needs.INPUTS

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """The block with experts rounded under the best scales.

        Raises:
            InputError: the hidden size or the width is not a multiple of 32.
        """
        return change_matrices(block, evidence, _calibrate)


def _calibrate(inputs_nN: torch.Tensor) -> Change:
    if not len(inputs_nN):
        return round_to_nearest
    means_N = inputs_nN.abs().mean(0)
    means_N = (means_N / means_N.max()).clamp_min(_SMALLEST_MEAN)  # a common factor of all scales changes nothing
    moment_NN = second_moment(inputs_nN)

    def change(weights_RN: torch.Tensor) -> torch.Tensor:
        candidates = (round_to_nearest(weights_RN * means_N**alpha) / means_N**alpha for alpha in _GRID)
        return min(candidates, key=lambda candidate_RN: _output_error(candidate_RN - weights_RN, moment_NN))

    return change


def _output_error(difference_RN: torch.Tensor, moment_NN: torch.Tensor) -> float:
    """Sum over the tokens of the squared norm of the difference's output."""
    difference_RN = difference_RN.double()
    return float(((difference_RN @ moment_NN) * difference_RN).sum())
