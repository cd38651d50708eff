"""Attention masks, for cases in which transformers' attention does not make the right one by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compressors.model.description.mixers import Mixer

__all__ = ["SinglePositions", "causal_mask", "layer_mask"]


@dataclass(frozen=True)
class SinglePositions:
    """Rows that are one position each, of texts whose keys and values are cached."""

    positions_B: torch.Tensor  # int64
    n_keys: int  # positions that the cache has room for, those behind a row's own included


def layer_mask(
    mixer: Mixer, place: int | SinglePositions, hidden_BTD: torch.Tensor, *, is_causal_by_itself: bool
) -> torch.Tensor | None:
    """Returns the mask of a layer, or None where attention needs none.

    Args:
        mixer: the layer's mixer; one without keys needs no mask.
        place: the position of the first state of every row, or the position of each row's only state.
        hidden_BTD: the states that enter the layer.
        is_causal_by_itself: attention without a mask lets no position look at later ones.
    """
    n_new = hidden_BTD.shape[1]
    if not mixer.cached_values:
        return None
    if isinstance(place, SinglePositions):
        return _mask_of_rows(place, mixer.window, hidden_BTD)
    is_short = mixer.window is None or place + n_new <= mixer.window
    return None if is_causal_by_itself and is_short else causal_mask(n_new, place, mixer.window, hidden_BTD)


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
    return _mask(keys[n_before:, None], keys, window, like)[None, None]


def _mask_of_rows(rows: SinglePositions, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """The mask of rows that look at the keys of all positions up to their own: [B, 1, 1, n_keys]."""
    keys = torch.arange(rows.n_keys, device=like.device)
    return _mask(rows.positions_B[:, None], keys, window, like)[:, None, None]


def _mask(queries_Q1: torch.Tensor, keys_K: torch.Tensor, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """The mask of these positions: [Q, K]."""
    may_look = keys_K <= queries_Q1
    if window is not None:
        may_look &= keys_K > queries_Q1 - window
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(may_look.shape, dtype=like.dtype, device=like.device).masked_fill_(~may_look, lowest)
