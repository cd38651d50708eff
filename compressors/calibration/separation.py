"""Finds text that two splits share: by tokens, and by characters where line ends, spaces or accents differ.

Both searches use rolling hashes. A long enough shared passage contains a whole piece of one of the texts, so each piece
is searched at every position of the other. Hashes give the candidates; the tokens or characters themselves decide.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from compressors.calibration.documents import DomainText

__all__ = ["SharedBlock", "Stream", "shared_blocks", "shared_text", "window_hashes", "without_blocks"]

Stream = tuple[DomainText, npt.NDArray[np.int64]]
"""A text, and consecutive tokens of it."""

_WINDOW = 1536  # bytes without spaces: about as much text as a block of 512 tokens
_SCANNED_BYTES = 1 << 17  # bytes that are hashed together, each of which takes a few times 8 bytes
_MULTIPLIER = 6364136223846793005  # from Knuth's linear congruential generator: odd, bits well spread


@dataclass(frozen=True)
class SharedBlock:
    """A block of tokens that also occurs in another text."""

    stream: int  # the index of its stream
    block: int  # its index in the stream
    part: DomainText
    other: DomainText


def shared_blocks(first: Sequence[Stream], second: Sequence[Stream], block_length: int) -> Iterator[SharedBlock]:
    """Yields the blocks of the first that occur in the second, at any position there."""
    windows = np.sort(np.concatenate([window_hashes(tokens, block_length) for _, tokens in second]))
    for stream, (part, tokens) in enumerate(first):
        block_hashes_B = window_hashes(tokens, block_length)[::block_length]
        for block in np.flatnonzero(_are_among(block_hashes_B, windows)).tolist():
            wanted = tokens[block * block_length : (block + 1) * block_length].tobytes()
            other = next((other for other, others in second if wanted in others.tobytes()), None)
            if other is not None:
                yield SharedBlock(stream, block, part, other)


def without_blocks(streams: Sequence[Stream], left_out: Sequence[SharedBlock], block_length: int) -> list[Stream]:
    """Cuts some blocks out of their streams."""
    kept = []
    for index, (part, tokens) in enumerate(streams):
        blocks = {found.block for found in left_out if found.stream == index}
        is_kept = np.array([position // block_length not in blocks for position in range(0, len(tokens), block_length)])
        kept.append((part, tokens[np.repeat(is_kept, block_length)[: len(tokens)]]))
    return kept


def shared_text(first: Sequence[DomainText], second: Sequence[DomainText]) -> tuple[DomainText, DomainText, str] | None:
    """Finds text of one that occurs in the other, ignoring spaces, line ends, byte order marks and Unicode forms.

    A shared passage of 3,071 bytes is always found, in either direction; one of fewer than 1,536 never is.

    Returns:
        Both parts, and how the shared text begins; None if they share none.
    """
    found = _occurrence(_Pieces(first), second)
    if found is not None:
        return found
    turned = _occurrence(_Pieces(second), first)
    return None if turned is None else (turned[1], turned[0], turned[2])


class _Pieces:
    """Consecutive pieces of normalised text, by their hashes."""

    def __init__(self, parts: Sequence[DomainText]) -> None:
        hashes: list[npt.NDArray[np.uint64]] = []
        self._of_hash: dict[int, tuple[DomainText, bytes]] = {}  # the part, and the piece's digest
        for part in parts:
            for data in _normalised(part, _WINDOW):
                whole = len(data) // _WINDOW
                rows = np.frombuffer(data, np.uint8, whole * _WINDOW).reshape(whole, _WINDOW)
                hashes.append(found := _row_hashes(rows))
                for row, value in zip(rows, found.tolist(), strict=True):
                    self._of_hash.setdefault(value, (part, _digest(row.tobytes())))
        self._hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))
        self._leading = np.zeros(1 << 16, np.bool_)  # to sort most positions out at once
        self._leading[self._hashes >> np.uint64(48)] = True

    def find(self, data: bytes) -> tuple[DomainText, str] | None:
        """The first of the pieces that occurs in the data."""
        windows = window_hashes(np.frombuffer(data, np.uint8), _WINDOW)
        near = np.flatnonzero(self._leading[windows >> np.uint64(48)])
        for place in near[_are_among(windows[near], self._hashes)].tolist():
            window = data[place : place + _WINDOW]
            part, digest = self._of_hash[int(windows[place])]
            if _digest(window) == digest:
                return part, window[:60].decode("utf-8", errors="ignore")
        return None


def _occurrence(pieces: _Pieces, texts: Sequence[DomainText]) -> tuple[DomainText, DomainText, str] | None:
    for other in texts:
        held = b""
        for data in _normalised(other, 1):
            held += data
            found = pieces.find(held)
            if found is not None:
                return found[0], other, found[1]
            held = held[-(_WINDOW - 1) :]
    return None


def _normalised(part: DomainText, multiple: int) -> Iterator[bytes]:
    """A part's text in Unicode's form NFKC, without white space, in UTF-8.

    The size of every chunk but the last is a multiple of ``multiple`` bytes.
    """
    held = b""
    for piece in part.pieces(_SCANNED_BYTES):
        text = unicodedata.normalize("NFKC", piece).replace("\ufeff", "")
        held += "".join(text.split()).encode("utf-8")
        cut = len(held) // multiple * multiple
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def window_hashes(tokens: npt.NDArray[np.integer], length: int) -> npt.NDArray[np.uint64]:
    """Polynomial hash, modulo 2^64, of the ``length`` tokens from each position on: uint64 [tokens - length + 1].

    With prefix sums S_i = sum_{j<i} t_j m^-j a window from i on is (S_{i+length} - S_i) m^i; an odd m has an inverse.
    """
    if len(tokens) < length:
        return np.empty(0, dtype=np.uint64)
    terms = (tokens.astype(np.uint64) + np.uint64(1)) * _powers(pow(_MULTIPLIER, -1, 2**64), len(tokens))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(terms, dtype=np.uint64)])
    windows: npt.NDArray[np.uint64] = (sums[length:] - sums[:-length]) * _powers(_MULTIPLIER, len(tokens) - length + 1)
    return windows


def _are_among(hashes: npt.NDArray[np.uint64], ordered: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Says for each hash whether it is among the ordered ones."""
    if not len(ordered):
        return np.zeros(len(hashes), np.bool_)
    found: npt.NDArray[np.bool_] = ordered[np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)] == hashes
    return found


def _row_hashes(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The polynomial hash of each whole row."""
    terms = (rows.astype(np.uint64) + np.uint64(1)) * _powers(pow(_MULTIPLIER, -1, 2**64), rows.shape[1])
    hashes: npt.NDArray[np.uint64] = terms.sum(axis=1, dtype=np.uint64)
    return hashes


def _powers(base: int, count: int) -> npt.NDArray[np.uint64]:
    """base^0 ... base^(count - 1) modulo 2^64."""
    return _all_powers(base, 1 << max(0, count - 1).bit_length())[:count]


@lru_cache(4)
def _all_powers(base: int, count: int) -> npt.NDArray[np.uint64]:
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
