"""Makes texts of which both sides take the same tokens: a calibration text and a held-out text, of whole blocks."""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compressors.calibration.splits import BLOCK_LENGTH, read_splits, tokenize
from compressors.model.files.tokenizer_files import load_tokenizer
from exporter.hub import bundled_text

__all__ = ["Texts", "write_texts"]

_BREAK = re.compile(r"\n(?:[ \t\r]*\n)+")
_LONGEST = 500  # characters of a document: fewer tokens than a block has


@dataclass(frozen=True)
class Texts:
    """The files of both sides."""

    calibration: Path  # ours; its last tenth of documents is set aside for selection
    statistics: Path  # theirs: the calibration text without that tenth
    heldout: Path  # of both


def write_texts(checkpoint: Path, folder: Path, n_calibration: int, n_heldout: int) -> Texts:
    """Writes bundled text with shuffled paragraphs, as much of it as gives these numbers of blocks.

    The tokenizer adds no BOS, so our blocks and the tools' chunks are the same consecutive tokens.

    Args:
        checkpoint: the folder with the tokenizer.
        folder: where the files are written.
        n_calibration: calibration blocks of 512 tokens.
        n_heldout: held-out blocks.
    """
    texts = Texts(folder / "calibration.txt", folder / "statistics.txt", folder / "heldout.txt")
    texts.heldout.write_text(_first_blocks(_paragraphs("heldout"), checkpoint, n_heldout), encoding="utf-8")
    paragraphs = _paragraphs("calibration")
    kept = _first_blocks(paragraphs, checkpoint, n_calibration).split("\n\n")
    selection = _set_aside(kept, paragraphs[len(kept) :])
    texts.calibration.write_text("\n\n".join([*kept, *selection]), encoding="utf-8")
    splits = read_splits(texts.calibration, texts.heldout)
    texts.statistics.write_text(splits.calibration.parts[0].text, encoding="utf-8")
    calibration, _, heldout = tokenize(splits, checkpoint)
    assert (calibration.n_blocks, heldout.n_blocks) == (n_calibration, n_heldout)
    return texts


def _set_aside(kept: list[str], others: list[str]) -> list[str]:
    """The last tenth of all documents: other paragraphs, joined into as many, with about a ninth of the kept text."""
    n_documents = -(-len(kept) // 9)
    length = sum(map(len, kept)) // 9 // n_documents
    documents = [""] * n_documents
    paragraphs = iter(others)
    for index in range(n_documents):
        while len(documents[index]) < length:
            documents[index] += next(paragraphs) + "\n"
    return [document.strip() for document in documents]


def _paragraphs(split: str) -> list[str]:
    """The documents of a bundled split, shuffled: the first blocks are of all domains."""
    texts = [file.read_text("utf-8") for file in sorted(bundled_text(split).glob("*.txt"))]
    documents = [part.strip()[:_LONGEST].strip() for text in texts for part in _BREAK.split(text) if part.strip()]
    order = np.random.default_rng(0).permutation(len(documents))
    return [documents[index] for index in order]


def _first_blocks(paragraphs: list[str], checkpoint: Path, n_blocks: int) -> str:
    """The first paragraphs that give these blocks together, and as few tokens more as can be."""
    tokenizer = load_tokenizer(checkpoint)

    def are_enough(n_paragraphs: int) -> bool:
        text = "\n\n".join(paragraphs[:n_paragraphs])
        return len(tokenizer.encode(text, add_special_tokens=False, verbose=False)) >= n_blocks * BLOCK_LENGTH

    most = n_blocks  # a paragraph is less than a block
    while not are_enough(most):
        most *= 2
    return "\n\n".join(paragraphs[: bisect_left(range(most), True, key=are_enough)])
