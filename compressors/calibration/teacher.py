"""The teacher's predictions for training tokens, kept on disk so that teacher and student never share memory.

For training tokens the 64 most probable next tokens and their log-probabilities are enough (512 bytes a token):
everything else is one bucket. Of selection and held-out tokens the inputs of the head are kept, which give the full
vocabulary again (:mod:`compressors.model.predictions.head_inputs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from compressors.calibration.sizes import TOP_TOKENS
from compressors.model.files.array_file import ArrayFile
from compressors.model.predictions.head_inputs import HeadInputs
from compressors.model.predictions.log_probs import LogProbSink
from compressors.model.predictions.losses import negative_log_likelihood
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.streaming import StreamedModel

__all__ = ["TeacherTargets", "by_block", "write_log_probs", "write_predictions", "write_targets"]


class TeacherTargets:
    """The teacher's most probable next tokens at every position of the training blocks, in two files of a folder.

    Raises:
        InputError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, *, writable: bool = False) -> None:
        self._log_probs, self._tokens = (ArrayFile.open(path, writable=writable) for path in _paths(folder))

    @classmethod
    def create(cls, folder: Path, n_positions: int, vocab_size: int) -> TeacherTargets:
        """Makes the folder with empty files."""
        folder.mkdir(parents=True, exist_ok=True)
        log_probs, tokens = _paths(folder)
        n_top = min(TOP_TOKENS, vocab_size)
        ArrayFile.create(log_probs, (n_positions, n_top), np.float32)
        ArrayFile.create(tokens, (n_positions, n_top), np.int32)
        return cls(folder, writable=True)

    def write(self, start: int, logits_NV: torch.Tensor) -> None:
        """Writes the targets of N positions from ``start`` on."""
        best = logits_NV.topk(self._tokens.shape[1], dim=-1)
        log_probs = best.values - logits_NV.logsumexp(-1, keepdim=True)
        self._log_probs.write(start, log_probs.numpy())
        self._tokens.write(start, best.indices.to(torch.int32).numpy())

    def of_blocks(self, blocks: Sequence[int], n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities, falling, float32; tokens, int64) of blocks of ``n_tokens``: [blocks * n_tokens, K]."""
        firsts = [block * n_tokens for block in blocks]
        log_probs, tokens = (
            np.concatenate([file.read(0, 0), *(file.read(first, first + n_tokens) for first in firsts)])
            for file in (self._log_probs, self._tokens)
        )
        return torch.from_numpy(log_probs), torch.from_numpy(tokens).long()


def _paths(folder: Path) -> tuple[Path, Path]:
    return folder / "log_probs.npy", folder / "tokens.npy"


@torch.no_grad()
def write_targets(model: StreamedModel, hidden: HiddenStates, targets: TeacherTargets, blocks: Sequence[int]) -> None:
    """Writes the targets that the teacher's hidden states after the last layer give.

    ``blocks`` says which blocks of the training text these are.
    """
    n_tokens = hidden.shape[1]
    for part, logits in model.logits_in_chunks(hidden, slice(0, n_tokens)):
        for start, rows in by_block(part, n_tokens, blocks):
            targets.write(start, logits[rows])


@torch.no_grad()
def write_log_probs(
    model: StreamedModel,
    tokens_BT: torch.Tensor,
    hidden: HiddenStates,
    scored: slice,
    writer: LogProbSink,
    blocks: Sequence[int],
) -> torch.Tensor:
    """Writes the full-vocabulary log-probabilities at the scored positions of each block, block after block.

    ``blocks`` says which blocks of the text these are.

    Returns:
        The negative log-likelihood of the token that follows each of these positions: float32 [N].
    """
    n_scored = scored.stop - scored.start
    targets = _following(tokens_BT, scored)
    likelihoods = torch.empty(len(targets))
    for part, logits in model.logits_in_chunks(hidden, scored):
        for start, rows in by_block(part, n_scored, blocks):
            writer.write(start, logits[rows])
        likelihoods[part] = negative_log_likelihood(logits, targets[part])
    return likelihoods


@torch.no_grad()
def write_predictions(
    model: StreamedModel,
    tokens_BT: torch.Tensor,
    hidden: HiddenStates,
    scored: slice,
    inputs: HeadInputs,
    blocks: Sequence[int],
) -> torch.Tensor:
    """Writes the inputs of the head, of which log-probabilities are made again; else as :func:`write_log_probs`."""
    n_scored = scored.stop - scored.start
    targets = _following(tokens_BT, scored)
    likelihoods = torch.empty(len(targets))
    for part, of_head, logits in model.predictions_in_chunks(hidden, scored):
        for start, rows in by_block(part, n_scored, blocks):
            inputs.write(start, of_head[rows])
        likelihoods[part] = negative_log_likelihood(logits, targets[part])
    return likelihoods


def _following(tokens_BT: torch.Tensor, scored: slice) -> torch.Tensor:
    """The token that follows each scored position, block after block."""
    return tokens_BT[:, scored.start + 1 : scored.stop + 1].flatten()


def by_block(part: slice, per_block: int, blocks: Sequence[int]) -> list[tuple[int, slice]]:
    """Cuts the positions ``part`` of these blocks at their borders.

    Returns:
        (position in the whole text, rows of the part) of each piece.
    """
    pieces = []
    start = part.start
    while start < part.stop:
        block = start // per_block
        stop = min(part.stop, (block + 1) * per_block)
        place = blocks[block] * per_block + start % per_block
        pieces.append((place, slice(start - part.start, stop - part.start)))
        start = stop
    return pieces
