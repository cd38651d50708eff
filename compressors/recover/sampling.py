"""Lets a model write texts in torch, layer by layer.

A student is trained on its own texts, so that it is corrected where it errs (on-policy distillation); the teacher's
texts show how often the original loops.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from compressors.model.errors import InputError
from compressors.model.predictions.next_token import draw_tokens
from compressors.model.running.memory import blocks_at_once, position_chunks
from compressors.model.running.streaming import StreamedModel
from compressors.recover.text_cache import TextCache, cache_bytes

__all__ = ["Choose", "continue_texts", "sample_texts"]

Choose = Callable[[torch.Tensor, slice, int], torch.Tensor]
"""(logits [b, V], the texts that they belong to, n) -> the n-th new token of each, int64 [b]."""


def sample_texts(
    model: StreamedModel, prompts_BP: torch.Tensor, uniform_BN: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Continues each prompt by N tokens, drawn from the model at temperature 1: see :func:`continue_texts`.

    Args:
        model: the model that writes.
        prompts_BP: int64 token ids.
        uniform_BN: float64 in [0, 1), one for each token to draw.
        dtype: the dtype of the arithmetic.
    """

    def choose(logits_bV: torch.Tensor, texts: slice, place: int) -> torch.Tensor:
        return draw_tokens(logits_bV, uniform_BN[texts, place])

    return continue_texts(model, prompts_BP, uniform_BN.shape[1], choose, dtype)


@torch.no_grad()
def continue_texts(
    model: StreamedModel,
    prompts_BP: torch.Tensor,
    n_new: int,
    choose: Choose,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Continues each prompt by N tokens.

    Keys and values, or states, are kept, so each new token costs one position. Layers are visited once for the prompts
    and once for each token after the first, for all texts together: a model whose layers do not stay in memory is read
    N times, so ask for many texts at once. Writing goes on after an end of text, as in the blocks of training text.

    Args:
        model: the model that writes.
        prompts_BP: int64 token ids.
        n_new: N.
        choose: picks the next token of each text.
        dtype: the dtype of the arithmetic.

    Returns:
        int64 [B, P + N].

    Raises:
        InputError: keys, values and states do not fit the memory limit.
    """
    n_prompt = prompts_BP.shape[1]
    texts_BT = torch.cat([prompts_BP, prompts_BP.new_zeros(len(prompts_BP), n_new)], dim=1)
    n_texts, n_tokens = texts_BT.shape
    n_bytes = cache_bytes(model.spec, n_texts, n_tokens, dtype)
    if model.reserve([n_bytes]) is None:
        raise InputError(
            f"{n_texts} texts that are written together need {n_bytes / 1e9:.2f} GB for their keys and values, which "
            "the memory limit has no room for: take fewer batches in a round, or raise --memory"
        )
    cache = TextCache(n_texts, n_tokens)
    for place in range(n_prompt, n_tokens):
        known = slice(0, place) if place == n_prompt else slice(place - 1, place)
        hidden_BtD = _through_layers(model, texts_BT[:, known], known.start, cache, dtype)
        texts_BT[:, place] = _next_tokens(model, hidden_BtD[:, -1], place - n_prompt, choose)
    return texts_BT


def _through_layers(
    model: StreamedModel, tokens_Bt: torch.Tensor, first_position: int, cache: TextCache, dtype: torch.dtype
) -> torch.Tensor:
    """Hidden states of these positions after the last layer: [B, t, D]."""
    hidden_BtD = model.embed(tokens_Bt).to(dtype)
    # a call takes as many positions as in any pass; single positions of all texts are fewer
    n_texts = blocks_at_once(dtype) if tokens_Bt.shape[1] > 1 else len(tokens_Bt)
    for index, weights in model.weights(range(model.spec.n_layers)):
        with model.layer(index, weights, dtype) as layer:
            for start in range(0, len(hidden_BtD), n_texts):
                texts = slice(start, start + n_texts)
                rows = hidden_BtD[texts].to(model.device)
                output = model.run_layer(layer, rows, first_position, cache.of(texts, first_position))
                hidden_BtD[texts] = output.to("cpu")
    return hidden_BtD


def _next_tokens(model: StreamedModel, hidden_BD: torch.Tensor, place: int, choose: Choose) -> torch.Tensor:
    with model.head(hidden_BD.dtype) as head:
        chosen = [
            choose(head(part.to(model.device)).cpu(), slice(start, start + len(part)), place)
            for start, part in position_chunks(hidden_BD, model.spec.vocab_size)
        ]
    return torch.cat(chosen)
