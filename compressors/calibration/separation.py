"""Finds text that two splits share: by tokens, and by characters where line ends, spaces or accents differ.

A long enough shared passage contains a whole piece of one of the texts, so each piece is searched at every position of
the other. Hashes give the candidates; the tokens or characters themselves decide.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from unicodedata import normalize

import numpy as np
import numpy.typing as npt

from compressors.calibration.documents import DomainText

__all__ = ["SharedBlock", "Stream", "shared_blocks", "shared_text", "window_hashes", "without_blocks"]

Stream = tuple[DomainText, npt.NDArray[np.int64]]
"""A text, and consecutive tokens of it."""

_WINDOW = 1536  # bytes without spaces: about as much text as a block of 512 tokens
_SCANNED_BYTES = 1 << 17  # bytes that are hashed together, each of which takes a few times 8 bytes
_MOST_PIECES = 1 << 20  # pieces whose hashes are held at once, those of 1.6 GB of text
_PLACES = np.arange(8) * (_WINDOW - 8) // 7  # where the bytes of a piece stand that are compared first
_PLACE_BITS = (1 << np.arange(8)).astype(np.uint8)
_TABLE_BITS = 22
_TABLE_SIZE = 1 << _TABLE_BITS
_OTHER_SPACE = re.compile("[\x85\u1680\u2028\u2029\ufeff]")  # what NFKC leaves of the spaces that are not ASCII
_ASCII_SPACE = b"\t\n\v\f\r\x1c\x1d\x1e\x1f "
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

    A shared passage of 3,071 bytes is always found; one of fewer than 1,536 never is. The shorter text is cut into
    pieces, of which only hashes are held; the longer one is searched for them.

    Returns:
        Both parts, and how the shared text begins; None if they share none.
    """
    turned = _n_bytes(first) > _n_bytes(second)
    shorter, longer = (second, first) if turned else (first, second)
    rows = (row for _, row in _pieces_of(shorter))
    while (pieces := _Pieces(islice(rows, _MOST_PIECES))).n_pieces:
        for other in longer:
            for window in pieces.windows_in(other):
                part = next((part for part, row in _pieces_of(shorter) if row == window), None)
                if part is not None:
                    begin = window[:60].decode("utf-8", errors="ignore")
                    return (other, part, begin) if turned else (part, other, begin)
    return None


class _Pieces:
    """The hashes of some pieces of normalised text, each of ``_WINDOW`` bytes.

    Almost every position of another text is sorted out by the 8 bytes that stand there and at seven places behind it:
    a table says whether any piece has bytes of the same hash at that place.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._known = np.zeros(_TABLE_SIZE, np.uint8)  # bit k: a piece has bytes of this hash at place k
        digests = bytearray()
        for piece in pieces:
            digests += _digest(piece)
            np.bitwise_or.at(self._known, _hashes_of_eight(piece)[_PLACES], _PLACE_BITS)
        self._digests = np.sort(np.frombuffer(digests, np.uint64))

    @property
    def n_pieces(self) -> int:
        """The number of pieces."""
        return len(self._digests)

    def windows_in(self, text: DomainText) -> Iterator[bytes]:
        """Yields what stands where one of the pieces seems to occur in a text."""
        held = b""
        for data in _normalised(text):
            held += data
            if len(held) >= _WINDOW:
                yield from self._windows(held)
                held = held[-(_WINDOW - 1) :]

    def _windows(self, data: bytes) -> Iterator[bytes]:
        known = self._known[_hashes_of_eight(data)]
        positions = np.flatnonzero(known[: len(data) - _WINDOW + 1] & _PLACE_BITS[0])
        for place, bit in zip(_PLACES[1:], _PLACE_BITS[1:], strict=True):
            positions = positions[known[positions + place] & bit != 0]
        digests = b"".join(_digest(data[position : position + _WINDOW]) for position in positions.tolist())
        found = _are_among(np.frombuffer(digests, np.uint64), self._digests)
        for position in positions[found].tolist():
            yield data[position : position + _WINDOW]


def _hashes_of_eight(data: bytes) -> npt.NDArray[np.intp]:
    """The hash of the 8 bytes at each position, below ``_TABLE_SIZE``: [bytes - 7]."""
    values = np.ndarray((len(data) - 7,), np.uint64, data, strides=(1,))
    hashes: npt.NDArray[np.intp] = ((values * np.uint64(_MULTIPLIER)) >> np.uint64(64 - _TABLE_BITS)).view(np.intp)
    return hashes


def _pieces_of(parts: Sequence[DomainText]) -> Iterator[tuple[DomainText, bytes]]:
    """Yields the consecutive whole pieces of each part's normalised text."""
    for part in parts:
        held = b""
        for data in _normalised(part):
            held += data
            n_whole = len(held) // _WINDOW * _WINDOW
            for start in range(0, n_whole, _WINDOW):
                yield part, held[start : start + _WINDOW]
            held = held[n_whole:]


def _n_bytes(parts: Sequence[DomainText]) -> int:
    return sum(part.n_bytes for part in parts)


def _normalised(part: DomainText) -> Iterator[bytes]:
    """A part's text in Unicode's form NFKC, without white space and byte order marks, in UTF-8.

    Lines of ASCII are in that form, and the others do not depend on the lines beside them.
    """
    for text in part.words(_SCANNED_BYTES):
        if not text.isascii():
            lines = text.split("\n")
            text = "".join(line if line.isascii() else _OTHER_SPACE.sub("", normalize("NFKC", line)) for line in lines)
        yield text.encode("utf-8").translate(None, _ASCII_SPACE)


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


def _powers(base: int, count: int) -> npt.NDArray[np.uint64]:
    """base^0 ... base^(count - 1) modulo 2^64."""
    return _all_powers(base, 1 << max(0, count - 1).bit_length())[:count]


@lru_cache(4)
def _all_powers(base: int, count: int) -> npt.NDArray[np.uint64]:
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
