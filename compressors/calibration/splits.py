"""Text -> documents -> splits -> token blocks.

A text is one file, or a folder with one ``*.txt`` file per domain; documents are separated by blank lines. Calibration
text may be a mixture of several, and of chats (:mod:`compressors.calibration.chats`). It is cut into three splits:
statistics and training see *calibration*, choices between candidates are judged on *selection*, and the report measures
*held-out*. Token blocks are llama-perplexity's (``tools/perplexity/perplexity.cpp`` of llama.cpp): a file is tokenised
and cut into consecutive blocks, the rest is dropped, and BOS takes the place of each block's first token when the
tokenizer adds BOS. A short text is tokenised whole, a long one only where blocks are taken
(:mod:`compressors.calibration.token_streams`).

Letters: B token blocks, T tokens of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from compressors.calibration.documents import DomainText, cut_parts, digest_of, read_parts
from compressors.calibration.mixture import WeightedText
from compressors.calibration.separation import Stream, shared_blocks, shared_text, without_blocks
from compressors.calibration.token_streams import (
    TextTokenizer,
    is_short,
    leading_streams,
    shares_of,
    spaced_streams,
    whole_streams,
)
from compressors.model.errors import InputError
from compressors.model.files.tokenizer_files import load_tokenizer, open_tokenizer

if TYPE_CHECKING:
    import torch

__all__ = [
    "BLOCK_LENGTH",
    "BlockCounts",
    "DomainText",
    "Splits",
    "TextSplit",
    "TextTokenizer",
    "TokenBlocks",
    "TokenizedSplit",
    "block_length_of",
    "load_tokenizer",
    "read_splits",
    "tokenize",
    "tokenize_heldout",
]

BLOCK_LENGTH = 512
"""Tokens of a block: llama-perplexity's default context. A model with a shorter context has blocks of that length."""
_MOST_SHARED = 100  # one block in this many may be left out


def block_length_of(context_length: int) -> int:
    """Returns the tokens of a block for a model with this context."""
    return min(BLOCK_LENGTH, context_length)


@dataclass(frozen=True)
class TextSplit:
    """The text that one purpose may see: one part per file, sorted by file name."""

    name: str  # calibration, selection or held-out
    parts: tuple[DomainText, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 of the parts' UTF-8 text, one after the other; for whole files ``cat *.txt | sha256sum``."""
        return digest_of(self.parts)

    @property
    def n_documents(self) -> int:
        """Documents of all parts together."""
        return sum(part.n_documents for part in self.parts)


@dataclass(frozen=True)
class Splits:
    """The three splits; none shares a document with another."""

    calibration: TextSplit
    selection: TextSplit
    heldout: TextSplit


@dataclass(frozen=True)
class BlockCounts:
    """The number of blocks that are wanted from each split."""

    calibration: int
    selection: int
    heldout_per_file: int


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
    """The full blocks of a split, file by file; for a long text only the wanted ones."""

    name: str
    blocks: tuple[tuple[str, npt.NDArray[np.int64]], ...]  # domain, [its blocks, T]
    weights: tuple[float, ...] = ()  # of the domains; empty: all are equal

    @property
    def n_blocks(self) -> int:
        """Full blocks of all files together."""
        return sum(len(blocks_BT) for _, blocks_BT in self.blocks)

    def spread(self, n_blocks: int) -> TokenBlocks:
        """Takes ``n_blocks`` by the files' weights, and evenly spaced inside each file.

        Domains take turns, in the order of their names, so any leading part of the result is balanced too; within a
        domain the blocks keep the file's order. A domain that runs out leaves its turns to the others.

        Raises:
            InputError: the split has fewer blocks.
        """
        self.check_has(n_blocks)
        chosen = [
            (domain, _evenly_spaced(blocks_BT, share))
            for (domain, blocks_BT), share in zip(self.blocks, self._shares(n_blocks), strict=True)
        ]
        return _taking_turns(chosen, self._all_weights)

    def described_mixture(self, n_blocks: int) -> str:
        """Says how many of ``n_blocks`` come from each file, and which file has fewer than its weight asks for."""
        named, weights = [], self._all_weights
        wanted = shares_of([n_blocks] * len(weights), n_blocks, weights)
        for (domain, _), share, of_weight in zip(self.blocks, self._shares(n_blocks), wanted, strict=True):
            named.append(f"{share} of {domain}" + (f" (all; by weight {of_weight})" if share < of_weight else ""))
        return f"blocks: {', '.join(named)}"

    @property
    def _all_weights(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.blocks)

    def _shares(self, n_blocks: int) -> list[int]:
        """The number of blocks that each file gives."""
        return shares_of([len(blocks_BT) for _, blocks_BT in self.blocks], n_blocks, self._all_weights)

    def check_has(self, n_blocks: int) -> None:
        """Checks that the split has so many blocks, and that at least one is asked for.

        Raises:
            InputError: it has fewer.
        """
        if not 1 <= n_blocks <= self.n_blocks:
            length = self.blocks[0][1].shape[1]
            raise InputError(
                f"{n_blocks} blocks of {length} tokens are asked of the {self.name} text, which has {self.n_blocks}; "
                "give more text or ask for fewer blocks"
            )

    def leading(self, n_blocks_per_file: int | None = None) -> TokenBlocks:
        """The first blocks of each file, file by file, as llama-perplexity's ``--chunks`` takes them; None: all.

        A file that has fewer gives all it has.
        """
        import torch

        taken = [(domain, blocks_BT[:n_blocks_per_file]) for domain, blocks_BT in self.blocks]
        return TokenBlocks(
            torch.from_numpy(np.concatenate([blocks_BT for _, blocks_BT in taken])),
            tuple(domain for domain, blocks_BT in taken for _ in range(len(blocks_BT))),
        )


def read_splits(calibration: Path | Sequence[WeightedText], heldout: Path | None = None) -> Splits:
    """Reads text from files or folders of ``*.txt`` and cuts it into the three splits.

    Args:
        calibration: a file or a folder, or several with their weights.
        heldout: a file or a folder.

    The last tenth of the documents of each calibration file is set aside for selection. Without ``heldout`` each file
    is cut 80/10/10 into calibration, selection and held-out. Every share is at least one document, and the splits keep
    their text byte for byte, blank lines included.

    Raises:
        InputError: a path does not exist, a file is empty or not UTF-8, or it has too few documents to be cut.
    """
    texts = [WeightedText(calibration)] if isinstance(calibration, Path) else calibration
    cuts = cut_parts(texts, 2 if heldout is not None else 3)
    heldout_parts = read_parts(heldout) if heldout is not None else tuple(cut[2] for cut in cuts)
    return Splits(
        TextSplit("calibration", tuple(cut[0] for cut in cuts)),
        TextSplit("selection", tuple(cut[1] for cut in cuts)),
        TextSplit("held-out", heldout_parts),
    )


def tokenize(
    splits: Splits, checkpoint_folder: Path, block_length: int = BLOCK_LENGTH, wanted: BlockCounts | None = None
) -> tuple[TokenizedSplit, TokenizedSplit, TokenizedSplit]:
    """Tokenises (calibration, selection, held-out) with the checkpoint's own tokenizer; nothing is downloaded.

    Files too short for one block give none.

    Args:
        splits: the texts.
        checkpoint_folder: the folder with the tokenizer.
        block_length: tokens of a block.
        wanted: blocks that are enough from a long text (:mod:`compressors.calibration.token_streams`); None: all.

    Raises:
        InputError: the checkpoint has no usable tokenizer, a split has no full block, or two splits share more than
            a few blocks of tokens, at any position, or as much text in another form.
    """
    in_order = (splits.calibration, splits.selection, splits.heldout)
    tokenizer = _tokenizer_for(checkpoint_folder, *in_order)
    enough: list[dict[str, int]] = [{}, {}, {}]
    if wanted is not None:
        enough = [{"spaced": wanted.calibration}, {"spaced": wanted.selection}, {"leading": wanted.heldout_per_file}]
    streams = [
        _streams(split, tokenizer, block_length, **of_split) for split, of_split in zip(in_order, enough, strict=True)
    ]
    streams = _kept_apart(in_order, streams, block_length)
    bos = _bos_token(tokenizer)
    calibration, selection, heldout = (
        _blocks_of(split, stream, block_length, bos) for split, stream in zip(in_order, streams, strict=True)
    )
    return calibration, selection, heldout


def tokenize_heldout(
    path: Path,
    tokenizer: Path | TextTokenizer,
    block_length: int = BLOCK_LENGTH,
    blocks_per_file: int | None = None,
) -> tuple[TextSplit, TokenizedSplit]:
    """Reads and tokenises held-out text alone, when nothing is calibrated.

    Args:
        path: a file, or a folder of ``*.txt``.
        tokenizer: a tokenizer, or a folder with one (such as a checkpoint).
        block_length: tokens of a block.
        blocks_per_file: the number of blocks to take from each file of a long text; None: all.

    Raises:
        InputError: as :func:`read_splits` and :func:`tokenize`.
    """
    split = TextSplit("held-out", read_parts(path))
    if isinstance(tokenizer, Path):
        tokenizer = _tokenizer_for(tokenizer, split)
    streams = _streams(split, tokenizer, block_length, leading=blocks_per_file)
    return split, _blocks_of(split, streams, block_length, _bos_token(tokenizer))


def _tokenizer_for(folder: Path, *splits: TextSplit) -> TextTokenizer:
    """The folder's tokenizer; for chats transformers', which writes them out."""
    has_chats = any(part.is_chats for split in splits for part in split.parts)
    return load_tokenizer(folder) if has_chats else open_tokenizer(folder)


def _bos_token(tokenizer: TextTokenizer) -> int | None:
    """The id of BOS if the tokenizer puts it before a text."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("a")[0] == bos else None


def _streams(
    split: TextSplit,
    tokenizer: TextTokenizer,
    block_length: int,
    *,
    spaced: int | None = None,
    leading: int | None = None,
) -> list[Stream]:
    """The split's tokens: for a long text enough for ``spaced`` blocks, or for ``leading`` blocks of each file.

    Raises:
        InputError: no file has enough for one block.
    """
    bos = _bos_token(tokenizer)
    if is_short(split.parts):
        streams = whole_streams(split.parts, tokenizer, bos)
    elif spaced is not None:
        streams = spaced_streams(split.parts, tokenizer, bos, spaced, block_length)
    else:
        n_tokens = None if leading is None else leading * block_length
        streams = leading_streams(split.parts, tokenizer, bos, n_tokens)
    longest_part, longest = max(streams, key=lambda stream: len(stream[1]))
    if len(longest) < block_length:
        raise InputError(
            f"the {split.name} text is too short: {longest_part.file} gives {len(longest)} tokens of it, "
            f"and {block_length} are needed for one block; give more text"
        )
    return streams


def _blocks_of(split: TextSplit, streams: list[Stream], block_length: int, bos: int | None) -> TokenizedSplit:

    blocks = []
    for part in split.parts:
        full = [_full_blocks(tokens, block_length) for of_part, tokens in streams if of_part is part]
        blocks_BT = np.concatenate([np.empty((0, block_length), dtype=np.int64), *full])
        if bos is not None:
            blocks_BT[:, 0] = bos
        blocks.append((part.domain, blocks_BT))
    return TokenizedSplit(split.name, tuple(blocks), tuple(part.weight for part in split.parts))


def _full_blocks(tokens: npt.NDArray[np.int64], block_length: int) -> npt.NDArray[np.int64]:
    """Returns the full blocks of these tokens: int64 [B, T]."""
    n_blocks = len(tokens) // block_length
    return tokens[: n_blocks * block_length].reshape(n_blocks, block_length)


def _kept_apart(splits: Sequence[TextSplit], streams: Sequence[list[Stream]], block_length: int) -> list[list[Stream]]:
    """Returns the streams without the few blocks (licence texts, tables) that a later split has too; refuses more."""
    kept = list(streams)
    for index, split in enumerate(splits[:-1]):
        for other in range(index + 1, len(splits)):
            kept[index] = _without_shared(split, splits[other], kept[index], kept[other], block_length)
        _refuse_shared_text(split, splits[index + 1 :])
    return kept


def _without_shared(
    split: TextSplit, other: TextSplit, streams: list[Stream], others: list[Stream], block_length: int
) -> list[Stream]:
    shared = list(shared_blocks(streams, others, block_length))
    n_blocks = sum(len(tokens) // block_length for _, tokens in streams)
    if len(shared) * _MOST_SHARED > n_blocks:
        raise _not_apart(split, other, shared[0].part, shared[0].other, f"{block_length} tokens in a row")
    return without_blocks(streams, shared, block_length) if shared else streams


def _refuse_shared_text(split: TextSplit, others: Sequence[TextSplit]) -> None:
    """Compares a split with all the others at once, so that its text, which may be long, is read once."""
    found = shared_text(split.parts, [part for other in others for part in other.parts])
    if found is not None:
        part, other_part, begin = found
        other = next(other for other in others if any(part is other_part for part in other.parts))
        what = f"the text that begins {begin!r}, apart from white space, line ends and the form of accents"
        raise _not_apart(split, other, part, other_part, what)


def _not_apart(first: TextSplit, second: TextSplit, part: DomainText, other: DomainText, what: str) -> InputError:
    return InputError(
        f"the {first.name} text ({part.file}) and the {second.name} text ({other.file}) must be kept apart, but "
        f"share {what}; remove it from one"
    )


def _evenly_spaced(blocks_BT: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Returns the middle block of each of ``count`` equal stretches."""
    picks = [(2 * index + 1) * len(blocks_BT) // (2 * count) for index in range(count)]
    return blocks_BT[picks]


def _taking_turns(chosen: list[tuple[str, npt.NDArray[np.int64]]], weights: Sequence[float]) -> TokenBlocks:
    """Orders blocks so that in every leading part the domains have about the share of their weights."""
    import torch

    turns = [
        ((turn + 1) / weight, index, turn)
        for index, ((_, blocks_BT), weight) in enumerate(zip(chosen, weights, strict=True))
        for turn in range(len(blocks_BT))
    ]
    order = [(chosen[index][0], chosen[index][1][turn]) for _, index, turn in sorted(turns)]
    return TokenBlocks(
        torch.from_numpy(np.stack([tokens_T for _, tokens_T in order])), tuple(domain for domain, _ in order)
    )
