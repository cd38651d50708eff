"""Attention masks, for cases in which transformers' attention does not make the right one by itself."""

from __future__ import annotations

import torch

__all__ = ["causal_mask"]


def causal_mask(n_new: int, n_before: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """Returns the mask that is added to the attention logits: 0 where a position may look, else the lowest number.

    Args:
        n_new: the number of positions that look.
        n_before: the number of positions in front of them, which they see too.
        window: the number of positions that each may look at, itself included; None: all up to itself.
        like: a tensor whose dtype and device the mask has.

    Returns:
        [1, 1, n_new, n_before + n_new]
    """
    keys = torch.arange(n_before + n_new, device=like.device)
    queries = keys[n_before:, None]
    may_look = keys <= queries
    if window is not None:
        may_look &= keys > queries - window
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(may_look.shape, dtype=like.dtype, device=like.device).masked_fill_(~may_look, lowest)[None, None]
