"""Texts that a student writes: what it is taught on, so that it is corrected where it goes (on-policy distillation)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from compressors.model.errors import InputError
from compressors.model.memory import BLOCKS_AT_ONCE
from compressors.model.shape import MoeShape
from compressors.model.streaming import StreamedModel, position_chunks

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["cache_bytes", "draw_tokens", "random_numbers", "sample_texts"]


def random_numbers(key: Sequence[int], n: int) -> torch.Tensor:
    """Even in [0, 1), float64 [n]; the key alone decides them, so that they do not depend on who asks and when."""
    return torch.from_numpy(np.random.default_rng(list(key)).random(n))


def draw_tokens(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """A token from each softmax, at temperature 1: the first whose cumulative probability exceeds the number.

    Args:
        logits_BV: of the next token.
        uniform_B: float64 in [0, 1).

    Returns:
        int64 [B].
    """
    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0].clamp_max(logits_BV.shape[1] - 1)


def cache_bytes(shape: MoeShape, n_texts: int, n_tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the keys and values of all layers, and of one layer's hidden states."""
    per_token = shape.n_layers * 2 * shape.n_kv_heads * shape.head_dim + shape.hidden_size
    return n_texts * n_tokens * per_token * dtype.itemsize


@torch.no_grad()
def sample_texts(
    model: StreamedModel, prompts_BP: torch.Tensor, uniform_BN: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Continues each prompt by N tokens, drawn from the model at temperature 1.

    Keys and values are kept, so each new token costs one position. Layers are visited once for the prompts and once
    for each token after the first, for all texts together: a model whose layers do not stay in memory is read N times,
    so ask for many texts at once. An end of text does not end it, as in the blocks of training text.

    Args:
        model: what writes.
        prompts_BP: int64 token ids.
        uniform_BN: float64 in [0, 1), one for each token to draw.
        dtype: of the arithmetic.

    Returns:
        int64 [B, P + N].

    Raises:
        InputError: keys and values do not fit the memory limit.
    """
    n_prompt, n_new = prompts_BP.shape[1], uniform_BN.shape[1]
    texts_BT = torch.cat([prompts_BP, prompts_BP.new_zeros(len(prompts_BP), n_new)], dim=1)
    n_texts, n_tokens = texts_BT.shape
    n_bytes = cache_bytes(model.shape, n_texts, n_tokens, dtype)
    if not model.reserve(n_bytes):
        raise InputError(
            f"{n_texts} texts that the student writes together need {n_bytes / 1e9:.2f} GB for their keys and "
            "values, which the memory limit has no room for: take fewer batches in a round, or raise --memory"
        )
    cache = _Cache(model, n_texts, n_tokens, dtype)
    for place in range(n_prompt, n_prompt + n_new):
        known = slice(0, place) if place == n_prompt else slice(place - 1, place)
        hidden_BtD = _through_layers(model, texts_BT[:, known], known.start, cache, dtype)
        texts_BT[:, place] = _next_tokens(model, hidden_BtD[:, -1], uniform_BN[:, place - n_prompt])
    return texts_BT


def _through_layers(
    model: StreamedModel, tokens_Bt: torch.Tensor, first_position: int, cache: _Cache, dtype: torch.dtype
) -> torch.Tensor:
    """Hidden states of these positions after the last layer: [B, t, D]."""
    hidden_BtD = model.embed(tokens_Bt).to(dtype)
    # many positions at once are as many as in any pass; single positions of all texts are fewer
    n_texts = BLOCKS_AT_ONCE[dtype] if tokens_Bt.shape[1] > 1 else len(tokens_Bt)
    for index, weights in model.weights(range(model.shape.n_layers)):
        with model.layer(index, weights, dtype) as layer:
            for start in range(0, len(hidden_BtD), n_texts):
                texts = slice(start, start + n_texts)
                rows = hidden_BtD[texts].to(model.device)
                output = model.run_layer(layer, rows, first_position, cache.of(texts, first_position))
                hidden_BtD[texts] = output.to("cpu")
    return hidden_BtD


def _next_tokens(model: StreamedModel, hidden_BD: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    with model.head(hidden_BD.dtype) as head:
        drawn = [
            draw_tokens(head(part.to(model.device)).cpu(), uniform_B[start : start + len(part)])
            for start, part in position_chunks(hidden_BD, model.shape.vocab_size)
        ]
    return torch.cat(drawn)


class _Cache:
    """Keys and values of all layers, texts and positions, in memory that is taken once.

    transformers' own caches either copy everything for each token, or need a mask over what is not there yet.
    """

    def __init__(self, model: StreamedModel, n_texts: int, n_tokens: int, dtype: torch.dtype) -> None:
        shape = model.shape
        self._all = torch.empty(  # [L, keys and values, B, key-value heads, T, head_dim]
            (shape.n_layers, 2, n_texts, shape.n_kv_heads, n_tokens, shape.head_dim), dtype=dtype, device=model.device
        )

    def of(self, texts: slice, first_position: int) -> Cache:
        """What transformers' attention asks of a cache, for some texts whose next positions begin there."""
        return cast("Cache", _Part(self._all[:, :, texts], first_position))


class _Part:
    def __init__(self, arrays: torch.Tensor, first_position: int) -> None:
        self._arrays = arrays
        self._first_position = first_position

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts in those of the next positions, [B, heads, t, head_dim]; returns those of all positions so far."""
        stop = self._first_position + keys.shape[2]
        for array, new in zip(self._arrays[layer], (keys, values), strict=True):
            array[:, :, self._first_position : stop] = new
        all_keys, all_values = self._arrays[layer, :, :, :, :stop]
        return all_keys, all_values
