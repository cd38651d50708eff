"""The number and pattern of the weights that are set to zero."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from benchmarks.arms.matrices import Change, change_matrices
from compressors.model.errors import InputError
from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock, Needs

__all__ = ["Pattern", "Sparsity", "check_columns", "check_sparsity", "highest_mask", "two_of_four_mask"]

Pattern = Literal["unstructured", "2:4"]
"""Where the zeros may lie: anywhere, or exactly two in each group of four consecutive inputs."""


@dataclass(frozen=True)
class Sparsity(ABC):
    """A method that sets a share of every expert matrix to zero.

    Raises:
        InputError: when made, the sparsity or the pattern is not possible.
    """

    sparsity: float
    pattern: Pattern = "unstructured"
    needs: ClassVar[Needs] = Needs.INPUTS

    def __post_init__(self) -> None:
        """Checks what can be checked before there is a block."""
        check_sparsity(self.sparsity, self.pattern)

    def __call__(self, block: MoeBlock, evidence: Evidence) -> CompressedBlock:
        """The block with sparse experts.

        Raises:
            InputError: the pattern is 2:4 and the hidden size or the width is not a multiple of 4.
        """
        return change_matrices(block, evidence, self._checked)

    def _checked(self, inputs_nN: torch.Tensor) -> Change:
        check_columns(inputs_nN.shape[1], self.pattern)
        return self._calibrate(inputs_nN)

    @abstractmethod
    def _calibrate(self, inputs_nN: torch.Tensor) -> Change:
        """Returns the changed matrices that have these inputs."""


def check_sparsity(sparsity: float, pattern: Pattern) -> None:
    """Refuses what a method of sparsity cannot do.

    Raises:
        InputError: ``sparsity`` is not between 0 and 1, or not 0.5 where the pattern is 2:4; the pattern is unknown.
    """
    if pattern not in ("unstructured", "2:4"):
        raise InputError(f"sparsity pattern {pattern!r} is not known: choose unstructured or 2:4")
    if not 0 < sparsity < 1:
        raise InputError(f"sparsity {sparsity} is not possible: give a fraction of zeros between 0 and 1, not included")
    if pattern == "2:4" and sparsity != 0.5:
        raise InputError(f"sparsity {sparsity} is not possible with the pattern 2:4, whose sparsity is 0.5")


def check_columns(n_columns: int, pattern: Pattern) -> None:
    """Refuses a matrix that the pattern does not divide.

    Raises:
        InputError: the pattern is 2:4 and ``n_columns`` is not a multiple of 4.
    """
    if pattern == "2:4" and n_columns % 4:
        raise InputError(f"a matrix with {n_columns} inputs has no 2:4 pattern: their number must be a multiple of 4")


def highest_mask(scores_RN: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True for what stays of each row, all but the ``round(sparsity * N)`` lowest scores: bool [R, N].

    Of equal scores the lower index stays.
    """
    n_kept = scores_RN.shape[1] - round(sparsity * scores_RN.shape[1])
    order_RN = torch.argsort(scores_RN, dim=1, descending=True, stable=True)
    return torch.zeros_like(scores_RN, dtype=torch.bool).scatter_(1, order_RN[:, :n_kept], True)


def two_of_four_mask(scores_RN: torch.Tensor) -> torch.Tensor:
    """True for the two highest scores of every four consecutive columns: bool [R, N]; N is a multiple of 4."""
    return highest_mask(scores_RN.reshape(-1, 4), 0.5).reshape(scores_RN.shape)
