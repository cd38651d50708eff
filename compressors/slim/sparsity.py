"""How many weights are set to zero, and in which pattern."""

from __future__ import annotations

from typing import Literal

import torch

from compressors.model.errors import InputError

__all__ = ["Pattern", "check_columns", "check_sparsity", "highest_mask", "two_of_four_mask"]

Pattern = Literal["unstructured", "2:4"]
"""Where the zeros may lie: anywhere, or exactly two in each group of four consecutive inputs."""


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
