"""What the teacher says about training tokens, kept on disk so that teacher and student never share memory.

For training tokens the 64 most probable next tokens and their log-probabilities are enough (512 bytes a token):
everything else is one bucket. Selection and held-out tokens keep the full vocabulary
(:mod:`compressors.model.log_probs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compressors.model.errors import InputError
from compressors.model.log_probs import LogProbWriter
from compressors.model.losses import negative_log_likelihood
from compressors.model.streaming import StreamedModel

__all__ = ["TARGET_BYTES", "TOP_TOKENS", "TeacherTargets", "top_targets", "write_log_probs"]

TOP_TOKENS = 64
TARGET_BYTES = 8 * TOP_TOKENS
"""Bytes on disk of one training token's targets."""


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's most probable next tokens at every position of the training blocks."""

    log_probs_BTK: torch.Tensor  # float32, falling
    tokens_BTK: torch.Tensor  # int32

    def save(self, path: Path) -> None:
        """Writes both arrays into one safetensors file."""
        save_file({"log_probs": self.log_probs_BTK, "tokens": self.tokens_BTK}, path)

    @classmethod
    def load(cls, path: Path) -> TeacherTargets:
        """The inverse of :meth:`save`.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"the teacher's targets in {path} cannot be read ({error})") from None
        return cls(tensors["log_probs"], tensors["tokens"])


@torch.no_grad()
def top_targets(model: StreamedModel, hidden_BTD: torch.Tensor) -> TeacherTargets:
    """Targets from the teacher's hidden states after the last layer, [B, T, D]."""
    n_top = min(TOP_TOKENS, model.shape.vocab_size)
    log_probs = torch.empty(*hidden_BTD.shape[:2], n_top)
    tokens = torch.empty(*hidden_BTD.shape[:2], n_top, dtype=torch.int32)
    flat_log_probs, flat_tokens = log_probs.view(-1, n_top), tokens.view(-1, n_top)
    for positions, logits in model.logits_in_chunks(hidden_BTD.flatten(0, 1)):
        best = logits.topk(n_top, dim=-1)
        flat_log_probs[positions] = best.values - logits.logsumexp(-1, keepdim=True)
        flat_tokens[positions] = best.indices.to(torch.int32)
    return TeacherTargets(log_probs, tokens)


@torch.no_grad()
def write_log_probs(
    model: StreamedModel, tokens_BT: torch.Tensor, hidden_BTD: torch.Tensor, scored: slice, folder: Path
) -> torch.Tensor:
    """Writes the full-vocabulary log-probabilities at the scored positions of each block, block after block.

    Returns:
        The negative log-likelihood of the token that follows each of these positions: float32 [N].
    """
    hidden = hidden_BTD[:, scored].flatten(0, 1)
    targets = tokens_BT[:, scored.start + 1 : scored.stop + 1].flatten()
    likelihoods = torch.empty(len(hidden))
    writer = LogProbWriter(folder, len(hidden), model.shape.vocab_size)
    for positions, logits in model.logits_in_chunks(hidden):
        writer.append(logits)
        likelihoods[positions] = negative_log_likelihood(logits, targets[positions])
    writer.close()
    return likelihoods
