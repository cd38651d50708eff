"""The results of decompositions: factors that can be multiplied out into dense experts.

Letters beside those of :mod:`compressors.model.description.spec`: r rank, M bases shared in the layer, O rows and I
columns of a matrix (gate and up: O = F, I = D; down: O = D, I = F).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from compressors.model.errors import InputError
from compressors.shrink.moe_block import CompressedBlock, MoeBlock, SharedParts

__all__ = ["ExpertMatrices", "Factors", "LowRank", "check_rank", "with_factors"]


class Factors(Protocol):
    """One layer's experts in factored form."""

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense experts that the factors stand for: float32 gate_up [E, 2F, D], gate rows first, down [E, D, F].

        Without a gate the first is up alone, [E, F, D].
        """

    def parts(self, dtype: torch.dtype) -> SharedParts | None:
        """The factors as a base, in this dtype, and adapters; None if no sum of such stands for the experts."""


class ExpertMatrices(NamedTuple):
    """The matrices of one expert, or those that experts share."""

    of_inputs: tuple[torch.Tensor, ...]  # gate and up, or up alone: [F, D] each
    down_DF: torch.Tensor

    @classmethod
    def of(cls, block: MoeBlock, expert: int) -> ExpertMatrices:
        """Returns the matrices of a block's expert: float32."""
        return cls(block.input_matrices(expert), block.down(expert))

    def minus(self, other: ExpertMatrices) -> ExpertMatrices:
        """Returns the differences from the other's matrices."""
        of_inputs = (own - shared for own, shared in zip(self.of_inputs, other.of_inputs, strict=True))
        return ExpertMatrices(tuple(of_inputs), self.down_DF - other.down_DF)


@dataclass(frozen=True)
class LowRank:
    """One matrix of every expert as a product of rank r."""

    left_EOr: torch.Tensor  # float32
    right_ErI: torch.Tensor  # float32

    @classmethod
    def stack(cls, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> LowRank:
        """Makes it from each expert's left [O, r] and right [r, I], rounded to float32."""
        lefts, rights = zip(*pairs, strict=True)
        return cls(torch.stack(lefts).float(), torch.stack(rights).float())

    def product(self) -> torch.Tensor:
        """The matrices: float32 [E, O, I]."""
        return self.left_EOr @ self.right_ErI


def with_factors(block: MoeBlock, factors: Factors) -> CompressedBlock:
    """The block with the factors multiplied out, and the factors beside it."""
    result = CompressedBlock.rewritten(block, *factors.materialize())
    return replace(result, parts=factors.parts(block.down_EDF.dtype))


def check_rank(rank: int, block: MoeBlock) -> None:
    """Refuses a rank that no matrix of the block's experts can have.

    Raises:
        InputError: the rank is not between 1 and min(D, F).
    """
    full = min(block.size, block.width)
    if not 1 <= rank <= full:
        raise InputError(
            f"rank {rank} is impossible: experts of width {block.width} that read {block.size} values "
            f"have ranks from 1 to {full}"
        )
