"""Draws a next token: the same logits and numbers give the same token everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["draw_tokens", "random_numbers"]


def random_numbers(key: Sequence[int], n: int) -> torch.Tensor:
    """Returns numbers uniform in [0, 1), float64 [n]. Only the key decides them, not who asks or when."""
    import torch

    return torch.from_numpy(np.random.default_rng(list(key)).random(n))


def draw_tokens(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Draws a token from each softmax, at temperature 1: the first whose cumulative probability exceeds the number.

    Args:
        logits_BV: the logits of the next token.
        uniform_B: float64 in [0, 1).

    Returns:
        int64 [B].
    """
    import torch

    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0].clamp_max(logits_BV.shape[1] - 1)
