"""Tokenises texts: a short text whole, a long one not much further than its wanted blocks need.

A text of up to 4 MB, in files of up to 1 MB, is tokenised whole, file by file, as llama-perplexity does. A longer one
would cost minutes and gigabytes for tokens that nobody uses: only its beginning is tokenised, or one place for each
wanted block, evenly spaced. Chats are first written out by the model's chat template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol

import numpy as np
import numpy.typing as npt

from compressors.calibration.chats import written_out
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
    return [(part, _with_bos(part, _encoded(part, part.text, tokenizer), bos)) for part in parts]


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
            tokens.append(_encoded(part, piece, tokenizer))
            if n_tokens is not None and sum(map(len, tokens)) >= n_tokens:
                break
        streams.append((part, _with_bos(part, np.concatenate(tokens), bos)))
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
    weights = [part.weight for part in parts]
    n_places, most = n_blocks, sum(room)
    while n_places <= most:
        shares = zip(parts, shares_of(room, n_places, weights), strict=True)
        found = [(part, _blocks_at(part, n_of_part, tokenizer, block_length)) for part, n_of_part in shares]
        streams = [(part, _with_bos(part, tokens, bos)[:block_length]) for part, blocks in found for tokens in blocks]
        if len(streams) >= n_blocks:
            return streams
        n_places = 2 * n_places if n_places == most else min(2 * n_places, most)
    return leading_streams(parts, tokenizer, bos, n_blocks * block_length if n_blocks <= most else None)


def shares_of(room: Sequence[int], wanted: int, weights: Sequence[float]) -> list[int]:
    """Shares out ``wanted`` places in proportion to weights, to each part no more than its ``room``.

    The parts take turns, those of twice the weight twice as often (D'Hondt's method); of equal weights the first goes
    first. The turns of a part without further room go to the others.
    """
    assert wanted <= sum(room), (wanted, room)
    shares = [0] * len(room)
    turns = [(1 / weight, index) for index, (weight, most) in enumerate(zip(weights, room, strict=True)) if most]
    heapify(turns)
    for _ in range(wanted):
        _, index = heappop(turns)
        shares[index] += 1
        if shares[index] < room[index]:
            heappush(turns, ((shares[index] + 1) / weights[index], index))
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
    if part.is_chats:
        return _chats_between(part, start, stop, tokenizer, block_length)
    n_characters = block_length * _BYTES_PER_TOKEN
    text = part.read(start, min(stop, start + max(_STRETCH_BYTES, 2 * n_characters)))
    first = 0 if start == 0 else _first_document(text)
    while n_characters <= _LARGEST_PIECE:
        end = first + n_characters
        if end > len(text):
            text = part.read(start, min(stop, start + _MOST_BYTES_OF_CHARACTER * end))
        tokens = _encoded(part, text[first:end], tokenizer)
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


def _chats_between(
    part: DomainText, start: int, stop: int, tokenizer: TextTokenizer, block_length: int
) -> npt.NDArray[np.int64] | None:
    """The tokens of the whole chats between these bytes, as many as a block needs; None: too few."""
    n_bytes = _STRETCH_BYTES
    while True:
        text = part.read(start, min(stop, start + n_bytes))
        first = 0 if start == 0 else text.find("\n") + 1
        tokens = _encoded(part, text[first : text.rfind("\n") + 1], tokenizer)
        if len(tokens) >= block_length:
            return tokens
        if start + n_bytes >= stop or n_bytes >= _LARGEST_PIECE:
            return None
        n_bytes *= 2


def _encoded(part: DomainText, text: str, tokenizer: TextTokenizer) -> npt.NDArray[np.int64]:
    """The tokens of some text of a part; of chats it is whole lines."""
    texts = written_out(text, part.file, tokenizer) if part.is_chats else [text]
    tokens = (token for one in texts for token in tokenizer.encode(one, add_special_tokens=False, verbose=False))
    return np.fromiter(tokens, np.int64)


def _with_bos(part: DomainText, tokens: npt.NDArray[np.int64], bos: int | None) -> npt.NDArray[np.int64]:
    """Puts BOS before tokens of a part, unless a chat's template has put it there."""
    if bos is None or (part.is_chats and len(tokens) and tokens[0] == bos):
        return tokens
    return np.concatenate([np.array([bos], dtype=np.int64), tokens])
