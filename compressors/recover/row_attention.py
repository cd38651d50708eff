"""Attention of rows that are one position each, of texts whose keys and values are cached: text by text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from compressors.model.running.experts import ROWS_OF_A_PRODUCT

__all__ = ["attends_by_text", "attention_by_text", "padded"]

_SDPA = "sdpa"


def attends_by_text(layer: nn.Module) -> bool:
    """True if a layer's attention is a function that :func:`attention_by_text` replaces; eager attention is not."""
    configs = (getattr(module, "config", None) for module in layer.modules())
    return any(getattr(config, "_attn_implementation", None) == _SDPA for config in configs)


def padded(rows_n: torch.Tensor) -> torch.Tensor:
    """Repeats the first row until there are enough for :data:`~compressors.model.running.experts.ROWS_OF_A_PRODUCT`."""
    return torch.cat([rows_n, rows_n[:1].expand(-len(rows_n) % ROWS_OF_A_PRODUCT)])


@contextmanager
def attention_by_text(texts_n: torch.Tensor) -> Iterator[None]:
    """Lets transformers' attention take the keys and values of all texts, and the rows of each text together.

    So nothing is copied for every row. Rows of a text are padded, so that a row's bits do not depend on the others.

    Args:
        texts_n: the text of each row, int64.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = ALL_ATTENTION_FUNCTIONS[_SDPA]
    rows_of = {text: (texts_n == text).nonzero()[:, 0] for text in texts_n.unique().tolist()}

    def by_text(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        **options: object,
    ) -> tuple[torch.Tensor, None]:
        """Some layers name their arguments, so the names are transformers'."""
        outputs = value.new_empty(len(texts_n), 1, query.shape[1], value.shape[-1])
        for text, rows in rows_of.items():
            taken, of_text = padded(rows), slice(text, text + 1)
            of_rows = query[taken].transpose(0, 2), key[of_text], value[of_text], attention_mask[taken].transpose(0, 2)
            output_1qHh, _ = usual(module, *of_rows, **options)
            outputs[rows] = output_1qHh[0, : len(rows), None]
        return outputs, None

    ALL_ATTENTION_FUNCTIONS[_SDPA] = by_text
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_SDPA]
