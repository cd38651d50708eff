"""Finds out whether a checkpoint's output head is its embedding; the weights overrule ``tie_word_embeddings``.

transformers 5 ties the head only where the file holds none, or one that equals the embedding
(``PreTrainedModel.tie_weights``); llama.cpp's converter takes the file's head as well.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["is_own_head"]

_ROWS_AT_ONCE = 4096

_answers: dict[Hashable, bool] = {}
ReadRows = Callable[[slice], "torch.Tensor"]


def is_own_head(state: Hashable, n_rows: int, read_head: ReadRows, read_embedding: ReadRows) -> bool:
    """Returns whether the two matrices differ anywhere; reads no further than the first difference.

    Equal matrices are read whole, once in a process: it remembers the answer.

    Args:
        state: the state of the files; the answer is remembered for it.
        n_rows: the rows of each matrix: the vocabulary.
        read_head: reads some rows of ``lm_head.weight``, in storage dtype.
        read_embedding: reads the same rows of the embedding.

    Raises:
        InputError: the file cannot be read.
    """
    if state not in _answers:
        _answers[state] = _differ(n_rows, read_head, read_embedding)
    return _answers[state]


def _differ(n_rows: int, read_head: ReadRows, read_embedding: ReadRows) -> bool:
    import torch

    for start in range(0, n_rows, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, n_rows))
        if not torch.equal(read_head(rows).float(), read_embedding(rows).float()):
            return True
    return False
