"""Tokenises texts: a short text whole, a long one not much further than its wanted blocks need.

A text of up to 4 MB, in files of up to 1 MB, is tokenised whole, file by file, as llama-perplexity does. A longer one
would cost minutes and gigabytes for tokens that nobody uses: only its beginning is tokenised, or one place for each
wanted block, evenly spaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from compressors.calibration.documents import DomainText
from compressors.calibration.separation import Stream

__all__ = ["TextTokenizer", "is_short", "leading_streams", "shares_of", "spaced_streams", "whole_streams"]

_WHOLE_BYTES = 4_000_000  # the most in all files of a split
_WHOLE_FILE_BYTES = 1_000_000  # the most in each: tokenising takes 100 bytes of memory for one of text
_STRETCH_BYTES = 8192  # the least for each block that is taken from a long text: a few times its size
_BYTES_PER_TOKEN = 6  # more than most text has
_MOST_BYTES_OF_CHARACTER = 4  # in UTF-8
_SPARE_TOKENS = 8  # where text is cut, the tokens beside the cut are not those of the whole text
_LEAST_PIECE, _LARGEST_PIECE = 1 << 13, 1 << 18
_DOCUMENT = re.compile(r"\n[ \t\r]*\n")


class TextTokenizer(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    @property
    def bos_token_id(self) -> int | None:
        """The id of BOS, even if the tokenizer does not put it before a text."""

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = False) -> list[int]:
        """The tokens of a text."""


def is_short(parts: Sequence[DomainText]) -> bool:
    """True if the text is tokenised whole."""
    sizes = [part.n_bytes for part in parts]
    return sum(sizes) <= _WHOLE_BYTES and max(sizes) <= _WHOLE_FILE_BYTES


def whole_streams(parts: Sequence[DomainText], tokenizer: TextTokenizer, bos: int | None) -> list[Stream]:
    """Every part as one stream of all its tokens, BOS in front if there is one."""
    return [(part, _with_bos(_encoded(tokenizer, part.text), bos)) for part in parts]


def leading_streams(
    parts: Sequence[DomainText], tokenizer: TextTokenizer, bos: int | None, n_tokens: int | None
) -> list[Stream]:
    """The first tokens of every part, at least ``n_tokens`` if it has that many; None: all.

    The text is tokenised in pieces that end at line ends.
    """
    n_bytes = _LARGEST_PIECE
    if n_tokens is not None:
        n_bytes = min(max(n_tokens * _BYTES_PER_TOKEN, _LEAST_PIECE), _LARGEST_PIECE)
    streams = []
    for part in parts:
        tokens: list[npt.NDArray[np.int64]] = []
        for piece in part.pieces(n_bytes):
            tokens.append(_encoded(tokenizer, piece))
            if n_tokens is not None and sum(map(len, tokens)) >= n_tokens:
                break
        streams.append((part, _with_bos(np.concatenate(tokens), bos)))
    return streams


def spaced_streams(
    parts: Sequence[DomainText], tokenizer: TextTokenizer, bos: int | None, n_blocks: int, block_length: int
) -> list[Stream]:
    """Takes streams of one block each, at least ``n_blocks``, from evenly spaced places; the parts take turns.

    A block begins with a document where one begins near its place, otherwise with a line. If some places have too
    little text for a block, more places are tried, closer together. A text that is not much longer than its blocks is
    tokenised whole; one with too few places that have a block, from the beginning of each part.
    """
    room = [part.n_bytes // _STRETCH_BYTES for part in parts]
    n_places, most = n_blocks, sum(room)
    while n_places <= most:
        shares = zip(parts, shares_of(room, n_places), strict=True)
        found = [(part, _blocks_at(part, n_of_part, tokenizer, block_length)) for part, n_of_part in shares]
        streams = [(part, _with_bos(tokens, bos)[:block_length]) for part, blocks in found for tokens in blocks]
        if len(streams) >= n_blocks:
            return streams
        n_places = 2 * n_places if n_places == most else min(2 * n_places, most)
    return leading_streams(parts, tokenizer, bos, n_blocks * block_length if n_blocks <= most else None)


def shares_of(room: Sequence[int], wanted: int) -> list[int]:
    """Shares out ``wanted`` places in turn, to each part no more than its ``room``; all must find room."""
    assert wanted <= sum(room), (wanted, room)
    shares = [0] * len(room)
    left = wanted
    while left:
        for index, most in enumerate(room):
            if left and shares[index] < most:
                shares[index] += 1
                left -= 1
    return shares


def _blocks_at(
    part: DomainText, n_places: int, tokenizer: TextTokenizer, block_length: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Yields a block or a little more of each of some evenly spaced places that have text enough."""
    for place in range(n_places):
        start, stop = (part.n_bytes * edge // n_places for edge in (place, place + 1))
        tokens = _block_between(part, start, stop, tokenizer, block_length)
        if tokens is not None:
            yield tokens


def _block_between(
    part: DomainText, start: int, stop: int, tokenizer: TextTokenizer, block_length: int
) -> npt.NDArray[np.int64] | None:
    """The tokens of the first document that begins between these bytes, and of the text behind it; None: too few."""
    n_characters = block_length * _BYTES_PER_TOKEN
    text = part.read(start, min(stop, start + max(_STRETCH_BYTES, 2 * n_characters)))
    first = 0 if start == 0 else _first_document(text)
    while n_characters <= _LARGEST_PIECE:
        end = first + n_characters
        if end > len(text):
            text = part.read(start, min(stop, start + _MOST_BYTES_OF_CHARACTER * end))
        tokens = _encoded(tokenizer, text[first:end])
        if len(tokens) >= block_length + _SPARE_TOKENS:
            return tokens
        if end > len(text):  # the place has no more
            return tokens if len(tokens) >= block_length else None
        n_characters *= 2
    return None


def _first_document(text: str) -> int:
    """Finds the first document that begins in the first half of a text; else the first line; else 0."""
    half = len(text) // 2
    document = _DOCUMENT.search(text, 0, half)
    return document.end() if document is not None else text.find("\n", 0, half) + 1


def _encoded(tokenizer: TextTokenizer, text: str) -> npt.NDArray[np.int64]:
    return np.array(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64)


def _with_bos(tokens: npt.NDArray[np.int64], bos: int | None) -> npt.NDArray[np.int64]:
    return tokens if bos is None else np.concatenate([np.array([bos], dtype=np.int64), tokens])
