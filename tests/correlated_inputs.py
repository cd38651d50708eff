"""Weights and second moments of inputs for tests of error feedback, which gains only where inputs are correlated."""

from __future__ import annotations

import torch


def weights_and_moments(n_rows: int, n_columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a matrix [R, N], and second moments [N, N] of inputs that are correlated and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_columns, n_columns, generator=generator) / n_columns**0.5 + torch.eye(n_columns)
    inputs = torch.randn(3 * n_columns, n_columns, generator=generator) @ mixing
    inputs *= torch.rand(n_columns, generator=generator) + 0.2
    weights = torch.randn(n_rows, n_columns, generator=generator) * 0.05
    return weights, inputs.T @ inputs / len(inputs)
