"""Cloze accuracy: whether the model finds the last word of a passage.

The task is LAMBADA's (D. Paperno et al., arXiv 1606.06031; lm-evaluation-harness counts an answer as right when greedy
decoding gives all of the word's tokens), but on the held-out text: a passage is a chunk up to the last word of a
sentence or line. Teacher forcing over the word's tokens is greedy decoding as long as every token is right, so the pass
that measures perplexity answers all passages of a chunk at once.

Letters: B chunks, S scored positions of a chunk, W words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers.decoders import DecodeStream

from validate.metrics.bootstrap import Floats, Interval, bootstrap_interval
from validate.runtimes.backend import scored_positions

__all__ = ["LastWord", "cloze_figures", "find_last_words", "load_last_words", "save_last_words"]

# letters and digits, joined by apostrophes or hyphens, before what ends a sentence or before the end of the line
_LAST_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*(?=[.!?][\"'\u201d\u2019)\]]*\s|[^\w\n]*\n)")


@dataclass(frozen=True)
class LastWord:
    """A word that ends a passage, given by the scored positions that predict its tokens."""

    chunk: int
    first: int
    stop: int


def find_last_words(chunks_BT: npt.NDArray[np.int64], tokenizer: Any) -> list[LastWord]:
    """Finds the last words of sentences and lines whose tokens are all scored.

    Args:
        chunks_BT: held-out chunks.
        tokenizer: the model's tokenizer, of transformers. One that is not built on the tokenizers library does not
            tell the texts of single tokens: there are no words then.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    scored = scored_positions(chunks_BT.shape[1])
    words = []
    for chunk, tokens_T in enumerate(chunks_BT.tolist()):
        text, starts_T = _text(tokens_T, backend)
        for match in _LAST_WORD.finditer(text):
            # the tokens that hold characters of the word; position i predicts token i + 1
            first = int(np.searchsorted(starts_T, match.start(), side="right")) - 1
            stop = int(np.searchsorted(starts_T, match.end(), side="left"))
            if scored.start < first and stop <= scored.stop + 1:
                words.append(LastWord(chunk, first - 1 - scored.start, stop - 1 - scored.start))
    return words


def _text(tokens_T: Sequence[int], backend: Any) -> tuple[str, npt.NDArray[np.int64]]:
    """The text of a chunk, and the place where each token's text begins; a piece of a character has no own text."""
    stream = DecodeStream(skip_special_tokens=False)
    pieces = [stream.step(backend, token) or "" for token in tokens_T]
    lengths_T = [len(piece) for piece in pieces]
    return "".join(pieces), np.concatenate([[0], np.cumsum(lengths_T[:-1], dtype=np.int64)])


def save_last_words(words: Sequence[LastWord], path: Path) -> None:
    """Writes JSON."""
    path.write_text(json.dumps([[word.chunk, word.first, word.stop] for word in words]), encoding="utf-8")


def load_last_words(path: Path) -> list[LastWord]:
    """The inverse of :func:`save_last_words`."""
    return [LastWord(*entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def cloze_figures(
    right_N: npt.NDArray[np.bool_],
    teacher_right_N: npt.NDArray[np.bool_],
    words: Sequence[LastWord],
    domains_B: Sequence[str],
) -> dict[str, Any] | None:
    """Accuracy of a model and its teacher over all words and by domain, as plain data; None without words.

    Args:
        right_N: True at scored positions of all chunks where the model finds the next token most probable.
        teacher_right_N: the same for the teacher.
        words: the words to find.
        domains_B: the domain of each chunk.
    """
    if not words:
        return None
    n_chunks = len(domains_B)
    chunk_W = np.array([word.chunk for word in words])
    found_W, teacher_W = (
        _found(values_N.reshape(n_chunks, -1), words).astype(np.float64) for values_N in (right_N, teacher_right_N)
    )
    domain_W = np.array(domains_B)[chunk_W]
    by_domain = {
        domain: _figures(found_W[mine], teacher_W[mine], chunk_W[mine])
        for domain in dict.fromkeys(domains_B)
        if (mine := domain_W == domain).any()
    }
    return _figures(found_W, teacher_W, chunk_W) | {"domains": by_domain}


def _found(right_BS: npt.NDArray[np.bool_], words: Sequence[LastWord]) -> npt.NDArray[np.bool_]:
    return np.array([right_BS[word.chunk, word.first : word.stop].all() for word in words])


def _figures(found_W: Floats, teacher_W: Floats, chunk_W: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Computes the figures of some words; the intervals draw the chunks that hold them."""
    _, block_W = np.unique(chunk_W, return_inverse=True)
    found_B, teacher_B, words_B = (
        np.bincount(block_W, weights=part).astype(np.float64) for part in (found_W, teacher_W, np.ones(len(found_W)))
    )
    n_teacher = float(teacher_W.sum())
    return {
        "words": len(found_W),
        "accuracy": float(found_W.mean()),
        "accuracy_interval": _ratio_interval(found_B, words_B),
        "teacher_accuracy": float(teacher_W.mean()),
        "kept": float(found_W.sum()) / n_teacher if n_teacher else None,
        "kept_interval": _ratio_interval(found_B, teacher_B),
    }


def _ratio_interval(numerator_B: Floats, denominator_B: Floats) -> Interval | None:
    """The interval of a ratio of sums; None if some draw of the blocks would divide by zero."""

    def ratios(draws_DB: Floats) -> Floats:
        below_D = draws_DB @ denominator_B
        ratios_D = np.full(len(below_D), np.nan)
        np.divide(draws_DB @ numerator_B, below_D, out=ratios_D, where=below_D > 0)
        return ratios_D

    ends = bootstrap_interval(len(denominator_B), ratios)
    return None if ends is None or np.isnan(ends).any() else ends
