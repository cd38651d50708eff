"""Finds out whether texts have enough blocks for a plan, without tokenising more of them than that takes."""

from __future__ import annotations

from pathlib import Path

from compressors.calibration.splits import BlockCounts, Splits, TextSplit
from compressors.calibration.token_streams import TextTokenizer, is_short
from compressors.model.files.tokenizer_files import open_tokenizer

__all__ = ["have_enough"]

_LEAST_PIECE, _LARGEST_PIECE = 1 << 12, 1 << 17  # characters that are tokenised together
_CHARACTERS_PER_TOKEN = 3  # fewer than most text has: so little more is tokenised than is needed
_SPARE_TOKENS = 8  # a piece ends anywhere, so its last tokens may be others than those of the whole text


def have_enough(splits: Splits, folder: Path, block_length: int, wanted: BlockCounts) -> bool:
    """True if short texts certainly have as many blocks as are wanted; they may have as many where this is False.

    Args:
        splits: the texts.
        folder: the folder with the tokenizer.
        block_length: tokens of a block.
        wanted: the blocks that are enough of calibration and selection; of the held-out text it is one block.

    Raises:
        InputError: there is no usable tokenizer.
    """
    tokenizer = open_tokenizer(folder)
    needed = ((splits.calibration, wanted.calibration), (splits.selection, wanted.selection), (splits.heldout, 1))
    return all(_has(split, tokenizer, block_length, n_blocks) for split, n_blocks in needed)


def _has(split: TextSplit, tokenizer: TextTokenizer, block_length: int, n_blocks: int) -> bool:
    if not is_short(split.parts):
        return False
    for part in split.parts:
        text, n_tokens, first = part.text, 0, 0
        while first < len(text):
            n_characters = (n_blocks * block_length - n_tokens) * _CHARACTERS_PER_TOKEN
            last = first + min(max(n_characters, _LEAST_PIECE), _LARGEST_PIECE)
            tokens = tokenizer.encode(text[first:last], add_special_tokens=False, verbose=False)
            n_tokens += max(0, len(tokens) - _SPARE_TOKENS)
            first = last
            if n_tokens // block_length >= n_blocks:
                return True
        n_blocks -= n_tokens // block_length
    return False
