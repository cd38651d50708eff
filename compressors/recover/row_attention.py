"""Attention of rows that are one position each, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["attention_in_parts", "takes_parts"]

_SDPA = "sdpa"


def takes_parts(layer: nn.Module) -> bool:
    """True if a layer's attention is a function that :func:`attention_in_parts` replaces; eager attention is not."""
    configs = (getattr(module, "config", None) for module in layer.modules())
    return any(getattr(config, "_attn_implementation", None) == _SDPA for config in configs)


@contextmanager
def attention_in_parts(texts_n: torch.Tensor, n_at_once: int) -> Iterator[None]:
    """Gives transformers' attention the keys of all texts, and each row those of its own, a few rows at a time.

    So the rows take all the other products of a layer together, while the keys and values of few rows lie side by side.

    Args:
        texts_n: the text of each row, int64.
        n_at_once: rows whose keys and values are copied together.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = ALL_ATTENTION_FUNCTIONS[_SDPA]

    def in_parts(
        module: nn.Module,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        **options: object,
    ) -> tuple[torch.Tensor, None]:
        parts = [
            usual(module, queries[part], keys[texts], values[texts], mask[part], **options)[0]
            for part, texts in zip(torch.arange(len(texts_n)).split(n_at_once), texts_n.split(n_at_once), strict=True)
        ]
        return torch.cat(parts), None

    ALL_ATTENTION_FUNCTIONS[_SDPA] = in_parts
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_SDPA]
