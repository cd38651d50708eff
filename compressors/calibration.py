"""Text -> documents -> splits -> token blocks.

A text is one file, or a folder with one ``*.txt`` file per domain; documents are separated by blank lines. It is cut
into three splits: *calibration* is what statistics and training see, *selection* what choices between candidates are
judged on, *held-out* what the report measures. Token blocks are llama-perplexity's
(``tools/perplexity/perplexity.cpp`` of llama.cpp): a file is tokenised whole and cut into consecutive blocks, the
remainder is dropped, and BOS takes the place of each block's first token when the tokenizer adds BOS.

Letters: B token blocks, T tokens of a block.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.errors import InputError
from compressors.model.tokenizer_files import load_tokenizer

__all__ = [
    "BLOCK_LENGTH",
    "DomainText",
    "Splits",
    "TextSplit",
    "TextTokenizer",
    "TokenBlocks",
    "TokenizedSplit",
    "load_tokenizer",
    "read_splits",
    "tokenize",
    "tokenize_heldout",
]

BLOCK_LENGTH = 512
"""Tokens of a block: llama-perplexity's default context."""

_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")


class TextTokenizer(Protocol):
    """As much of a tokenizer of transformers as is needed here."""

    @property
    def bos_token_id(self) -> int | None:
        """BOS, whether it is put before a text or not."""

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = False) -> list[int]:
        """The tokens of a text."""


@dataclass(frozen=True)
class DomainText:
    """The part of one file that belongs to a split."""

    domain: str  # the file's name without .txt
    file: Path
    text: str


@dataclass(frozen=True)
class TextSplit:
    """What one purpose may see, one part per file, by file name."""

    name: str  # calibration, selection or held-out
    parts: tuple[DomainText, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 of the parts' UTF-8 text, one after the other; for whole files ``cat *.txt | sha256sum``."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part.text.encode("utf-8"))
        return digest.hexdigest()

    @property
    def n_documents(self) -> int:
        """Documents of all parts together."""
        return sum(1 for part in self.parts for _ in _document_starts(part.text))


@dataclass(frozen=True)
class Splits:
    """The three splits; none shares a document with another."""

    calibration: TextSplit
    selection: TextSplit
    heldout: TextSplit


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of tokens, each to be run as a sequence of its own."""

    tokens_BT: torch.Tensor  # int64
    domains_B: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 over the shape and the tokens as little-endian int64."""
        tokens_BT = self.tokens_BT.numpy().astype("<i8")
        return hashlib.sha256(f"{tokens_BT.shape}".encode() + tokens_BT.tobytes()).hexdigest()


@dataclass(frozen=True)
class TokenizedSplit:
    """All full blocks of a split, file by file."""

    name: str
    blocks: tuple[tuple[str, torch.Tensor], ...]  # domain, int64 [its blocks, T]

    @property
    def n_blocks(self) -> int:
        """Full blocks of all files together."""
        return sum(len(blocks_BT) for _, blocks_BT in self.blocks)

    def spread(self, n_blocks: int) -> TokenBlocks:
        """Takes ``n_blocks`` evenly over the files, and evenly spaced inside each file.

        Domains take turns, in the order of their names, so any leading part of the result is balanced too; within a
        domain the blocks keep the file's order. A domain that runs out leaves its turns to the others.

        Raises:
            InputError: the split has fewer blocks.
        """
        if not 1 <= n_blocks <= self.n_blocks:
            length = self.blocks[0][1].shape[1]
            raise InputError(
                f"{n_blocks} blocks of {length} tokens are asked of the {self.name} text, which has {self.n_blocks}; "
                "give more text or ask for fewer blocks"
            )
        chosen = [
            (domain, _evenly_spaced(blocks_BT, share))
            for (domain, blocks_BT), share in zip(self.blocks, self._shares(n_blocks), strict=True)
        ]
        return _taking_turns(chosen)

    def leading(self, n_blocks_per_file: int | None = None) -> TokenBlocks:
        """The first blocks of each file, file by file, as llama-perplexity's ``--chunks`` takes them; None: all.

        A file that has fewer gives all it has.
        """
        taken = [(domain, blocks_BT[:n_blocks_per_file]) for domain, blocks_BT in self.blocks]
        return TokenBlocks(
            torch.cat([blocks_BT for _, blocks_BT in taken]),
            tuple(domain for domain, blocks_BT in taken for _ in range(len(blocks_BT))),
        )

    def _shares(self, n_blocks: int) -> list[int]:
        shares = [0] * len(self.blocks)
        while sum(shares) < n_blocks:
            for index, (_, blocks_BT) in enumerate(self.blocks):
                if shares[index] < len(blocks_BT) and sum(shares) < n_blocks:
                    shares[index] += 1
        return shares


def read_splits(calibration: Path, heldout: Path | None = None) -> Splits:
    """Reads text from files or folders of ``*.txt`` and cuts it into the three splits.

    The last tenth of the documents of each calibration file is set aside for selection. Without ``heldout`` each file
    is cut 80/10/10 into calibration, selection and held-out. Every share is at least one document, and the splits keep
    their text byte for byte, blank lines included.

    Raises:
        InputError: a path does not exist, a file is empty or not UTF-8, or it has too few documents to be cut.
    """
    sources = _read_parts(calibration)
    n_shares = 2 if heldout is not None else 3
    cuts = [_cut(part, n_shares) for part in sources]
    heldout_parts = _read_parts(heldout) if heldout is not None else tuple(cut[2] for cut in cuts)
    return Splits(
        TextSplit("calibration", tuple(cut[0] for cut in cuts)),
        TextSplit("selection", tuple(cut[1] for cut in cuts)),
        TextSplit("held-out", heldout_parts),
    )


def tokenize(
    splits: Splits, checkpoint_folder: Path, block_length: int = BLOCK_LENGTH
) -> tuple[TokenizedSplit, TokenizedSplit, TokenizedSplit]:
    """Tokenises (calibration, selection, held-out) with the checkpoint's own tokenizer; nothing is downloaded.

    Files too short for one block give none.

    Raises:
        InputError: the checkpoint has no usable tokenizer, a split has no full block, or a block of one split occurs
            in another, at whatever position.
    """
    tokenizer = load_tokenizer(checkpoint_folder)
    bos = _bos_token(tokenizer)
    in_order = (splits.calibration, splits.selection, splits.heldout)
    streams = [_token_streams(split, tokenizer, bos) for split in in_order]
    for split, stream in zip(in_order, streams, strict=True):
        _check_length(split, stream, block_length)
    _refuse_shared_blocks(in_order, streams, block_length)
    calibration, selection, heldout = (
        _blocks_of(split.name, stream, block_length, bos) for split, stream in zip(in_order, streams, strict=True)
    )
    return calibration, selection, heldout


def tokenize_heldout(
    path: Path, tokenizer: Path | TextTokenizer, block_length: int = BLOCK_LENGTH
) -> tuple[TextSplit, TokenizedSplit]:
    """Reads and tokenises held-out text alone, when nothing is calibrated.

    ``tokenizer`` is one, or the folder of one (such as a checkpoint's).

    Raises:
        InputError: as :func:`read_splits` and :func:`tokenize`.
    """
    split = TextSplit("held-out", _read_parts(path))
    if isinstance(tokenizer, Path):
        tokenizer = load_tokenizer(tokenizer)
    bos = _bos_token(tokenizer)
    streams = _token_streams(split, tokenizer, bos)
    _check_length(split, streams, block_length)
    return split, _blocks_of(split.name, streams, block_length, bos)


_Stream = tuple[DomainText, npt.NDArray[np.int64]]


def _read_parts(path: Path) -> tuple[DomainText, ...]:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no *.txt file; put the text there, one file per domain")
    return tuple(DomainText(file.stem, file, _read_text(file)) for file in files)


def _read_text(file: Path) -> str:
    try:
        # Bytes, because reading as text would turn \r\n into \n and change the tokens.
        text = file.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    if not text.strip():
        raise InputError(f"{file} is empty; give a file with text, documents separated by blank lines")
    return text


def _cut(part: DomainText, n_shares: int) -> list[DomainText]:
    """Cuts off a tenth of the documents for each share after the first, the last share last."""
    starts = list(_document_starts(part.text))
    tenth = max(1, len(starts) // 10)
    if len(starts) < n_shares:
        raise InputError(
            f"{part.file} has {len(starts)} document(s), but {n_shares} are needed to set text aside; "
            "separate documents by blank lines"
        )
    cuts = [0, *(starts[-tenth * share] for share in range(n_shares - 1, 0, -1)), len(part.text)]
    return [DomainText(part.domain, part.file, part.text[start:stop]) for start, stop in pairwise(cuts)]


def _document_starts(text: str) -> Iterator[int]:
    start = 0
    for separator in _BLANK_LINES.finditer(text):
        if text[start : separator.start()].strip():
            yield start
        start = separator.end()
    if text[start:].strip():
        yield start


def _bos_token(tokenizer: TextTokenizer) -> int | None:
    """The id of BOS if the tokenizer puts it before a text."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("a")[0] == bos else None


def _token_streams(split: TextSplit, tokenizer: TextTokenizer, bos: int | None) -> list[_Stream]:
    streams = []
    for part in split.parts:
        tokens = tokenizer.encode(part.text, add_special_tokens=False, verbose=False)
        streams.append((part, np.array(tokens if bos is None else [bos, *tokens], dtype=np.int64)))
    return streams


def _check_length(split: TextSplit, streams: list[_Stream], block_length: int) -> None:
    longest_part, longest = max(streams, key=lambda stream: len(stream[1]))
    if len(longest) < block_length:
        raise InputError(
            f"the {split.name} text is too short: {longest_part.file} gives {len(longest)} tokens of it, "
            f"and {block_length} are needed for one block; give more text"
        )


def _blocks_of(name: str, streams: list[_Stream], block_length: int, bos: int | None) -> TokenizedSplit:
    blocks = []
    for part, tokens in streams:
        blocks_BT = _full_blocks(tokens, block_length).copy()
        if bos is not None:
            blocks_BT[:, 0] = bos
        blocks.append((part.domain, torch.from_numpy(blocks_BT)))
    return TokenizedSplit(name, tuple(blocks))


def _full_blocks(tokens: npt.NDArray[np.int64], block_length: int) -> npt.NDArray[np.int64]:
    """int64 [B, T]."""
    n_blocks = len(tokens) // block_length
    return tokens[: n_blocks * block_length].reshape(n_blocks, block_length)


def _refuse_shared_blocks(splits: Sequence[TextSplit], streams: Sequence[list[_Stream]], block_length: int) -> None:
    for (first, first_streams), (second, second_streams) in combinations(zip(splits, streams, strict=True), 2):
        shared = _shared_block(first_streams, second_streams, block_length)
        if shared is not None:
            part, other, block = shared
            raise InputError(
                f"the {first.name} text ({part.file}) and the {second.name} text ({other.file}) must be kept apart, "
                f"but share {block_length} tokens in a row (block {block} of the {first.name} text); "
                "remove them from one"
            )


def _shared_block(
    first: list[_Stream], second: list[_Stream], block_length: int
) -> tuple[DomainText, DomainText, int] | None:
    """The parts that share a block, and its number in the first. Hashes narrow it down, the tokens decide."""
    hashes = [np.unique(_window_hashes(tokens, block_length)) for _, tokens in second]
    for part, tokens in first:
        blocks_BT = _full_blocks(tokens, block_length)
        block_hashes_B = _window_hashes(tokens, block_length)[::block_length]
        for (other, other_tokens), other_hashes in zip(second, hashes, strict=True):
            for block in np.flatnonzero(np.isin(block_hashes_B, other_hashes)):
                if blocks_BT[block].tobytes() in other_tokens.tobytes():
                    return part, other, int(block)
    return None


def _window_hashes(tokens: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.uint64]:
    """Polynomial hash, modulo 2^64, of the ``length`` tokens from each position on: uint64 [tokens - length + 1].

    With prefix sums S_i = sum_{j<i} t_j m^-j a window from i on is (S_{i+length} - S_i) m^i; an odd m has an inverse.
    """
    if len(tokens) < length:
        return np.empty(0, dtype=np.uint64)
    multiplier = 6364136223846793005  # of Knuth's linear congruential generator: odd, bits well spread
    inverse = pow(multiplier, -1, 2**64)
    powers = _powers(multiplier, len(tokens))
    terms = (tokens.astype(np.uint64) + np.uint64(1)) * _powers(inverse, len(tokens))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(terms, dtype=np.uint64)])
    windows: npt.NDArray[np.uint64] = (sums[length:] - sums[:-length]) * powers[: len(sums) - length]
    return windows


def _powers(base: int, count: int) -> npt.NDArray[np.uint64]:
    """base^0 ... base^(count - 1) modulo 2^64."""
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _evenly_spaced(blocks_BT: torch.Tensor, count: int) -> torch.Tensor:
    """The middle block of each of ``count`` equal stretches."""
    picks = [(2 * index + 1) * len(blocks_BT) // (2 * count) for index in range(count)]
    return blocks_BT[picks]


def _taking_turns(chosen: list[tuple[str, torch.Tensor]]) -> TokenBlocks:
    order = [
        (domain, blocks_BT[turn])
        for turn in range(max(len(blocks_BT) for _, blocks_BT in chosen))
        for domain, blocks_BT in chosen
        if turn < len(blocks_BT)
    ]
    return TokenBlocks(torch.stack([tokens_T for _, tokens_T in order]), tuple(domain for domain, _ in order))
