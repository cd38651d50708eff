"""The column sweep that SparseGPT and GPTQ share: settle one column, let the columns after it make up for the error.

For a row w of a matrix with inputs x, the error of the output is quadratic, with Hessian H = sum x x^T (up to a
factor). Optimal Brain Surgeon (Hassibi and Stork, 1993) gives the best change of the weights not yet settled, F, when
weight j is set to q: w_F -= (w_j - q) / [H_F^-1]_jj * [H_F^-1]_j. With the upper Cholesky factor U of H^-1 = U^T U,
row j of U is row j of H_F^-1 over the root of its diagonal, so one factor serves all steps (arXiv 2210.17323,
section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from compressors.shrink.moe_block import second_moment

__all__ = ["BLOCK", "Settle", "inverse_factor", "sweep"]

BLOCK = 128
"""Columns after which the rest of the matrix is updated; also SparseGPT's block of mask selection, as published."""

Settle = Callable[[torch.Tensor, int], torch.Tensor]
"""The matrix [R, N] as it stands and a column to the column's final values [R]. Up to the end of the column's block
the matrix is up to date."""

_DAMPING = 0.01  # of the mean diagonal, as in the public code of both papers


def inverse_factor(inputs_nN: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the inputs' damped second moment: float64 [N, N].

    Without inputs all columns count alike: the identity.
    """
    hessian_NN = second_moment(inputs_nN)
    damping = _DAMPING * hessian_NN.diagonal().mean()
    hessian_NN.diagonal().add_(damping if damping > 0 else 1.0)
    inverse_NN = torch.cholesky_inverse(torch.linalg.cholesky(hessian_NN))
    factor_NN: torch.Tensor = torch.linalg.cholesky(inverse_NN, upper=True)
    return factor_NN


def sweep(weights_RN: torch.Tensor, factor_NN: torch.Tensor, settle: Settle) -> torch.Tensor:
    """Settles the columns from first to last; the others are corrected after each: float32 [R, N]."""
    current_RN = weights_RN.to(torch.float64, copy=True)
    for start in range(0, current_RN.shape[1], BLOCK):
        block_RB, rows_BN = current_RN[:, start : start + BLOCK], factor_NN[start : start + BLOCK]
        errors_RB = torch.empty_like(block_RB)
        for index in range(block_RB.shape[1]):
            settled_R = settle(current_RN, start + index)
            row_B = rows_BN[index, start : start + BLOCK]
            errors_RB[:, index] = (block_RB[:, index] - settled_R) / row_B[index]
            block_RB[:, index + 1 :] -= errors_RB[:, index, None] * row_B[index + 1 :]
            block_RB[:, index] = settled_R
        current_RN[:, start + BLOCK :] -= errors_RB @ rows_BN[:, start + BLOCK :]
    return current_RN.float()
