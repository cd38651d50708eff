"""Measures a student's distance from its teacher on a split that no training sees, which judges each recovery."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from compressors.calibration.teacher import by_block
from compressors.model.errors import InputError
from compressors.model.parallel import reduce_sum, share
from compressors.model.predictions.log_probs import KnownLogProbs
from compressors.model.predictions.losses import kl_divergence, negative_log_likelihood
from compressors.model.running.expert_choice import ExpertChoice
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.student import Student

__all__ = ["Judgement", "judge"]


@dataclass(frozen=True)
class Judgement:
    """A student's figures on a split that no training sees."""

    divergence: float  # mean full-vocabulary KL(teacher || student), nats
    perplexity: float


@torch.no_grad()
def judge(
    student: Student,
    tokens_BT: torch.Tensor,
    teacher: KnownLogProbs,
    scored: slice,
    progress: Callable[[int], None] | None = None,
    limit: MemoryLimit | None = None,
    device: torch.device | None = None,
    choice: ExpertChoice | None = None,
    write: Callable[[int | None], None] | None = None,
) -> Judgement:
    """Computes divergence from the teacher and perplexity, over the scored positions of the blocks.

    Args:
        student: the model that is judged, in float32.
        tokens_BT: int64 token blocks.
        teacher: log-probabilities at the scored positions, block after block.
        scored: positions of each block; each has a next token.
        progress: called with 1 after each layer.
        limit: memory that this process may use.
        device: the device on which layers compute.
        choice: a choice of experts in place of the student's top-k.
        write: makes a layer's weights readable, or for None the head's, in place of those that it made readable
            before; the model holds none meanwhile. None: all can be read.

    Raises:
        InputError: teacher and student have different vocabularies.
    """
    _check_vocabulary(teacher, student)
    model = StreamedModel(student, limit=limit, device=device, choice=choice)
    mine = share(len(tokens_BT))
    group = TokenGroup(tokens_BT[mine])
    if write is None:
        (hidden,) = model.stream([group], progress)
    else:
        hidden = _layer_by_layer(model, group, write, progress)
    n_scored = scored.stop - scored.start
    following = tokens_BT[mine, scored.start + 1 : scored.stop + 1].flatten()
    totals = torch.zeros(2, dtype=torch.float64)
    for positions, logits in model.logits_in_chunks(hidden, scored):
        totals[1] += negative_log_likelihood(logits, following[positions]).sum().double()
        for place, rows in by_block(positions, n_scored, mine):
            log_probs = teacher.rows(place, place + rows.stop - rows.start)
            totals[0] += kl_divergence(log_probs, logits[rows]).sum().double()
    model.release()
    reduce_sum([totals])
    divergence, likelihood = (totals / (len(tokens_BT) * n_scored)).tolist()
    return Judgement(divergence, math.exp(likelihood))


def _layer_by_layer(
    model: StreamedModel,
    group: TokenGroup,
    write: Callable[[int | None], None],
    progress: Callable[[int], None] | None,
) -> HiddenStates:
    """The hidden states after the last layer, where one layer at a time can be read; then the head can."""
    hidden = model.first_states([group], spilled=True)  # to write a layer may take all memory
    for layer in range(model.spec.n_layers):
        model.release()
        write(layer)
        model.release()  # gives back what writing has freed
        for _ in model.advance([group], hidden, range(layer, layer + 1)):
            if progress is not None:
                progress(1)
    model.release()
    write(None)
    model.release()
    return hidden[0]


def _check_vocabulary(teacher: KnownLogProbs, student: Student) -> None:
    n_tokens, vocab_size = teacher.rows(0, 1).shape[1], student.spec.vocab_size
    if n_tokens != vocab_size:
        raise InputError(
            f"the teacher's log-probabilities are of {n_tokens} tokens, but the student's vocabulary has {vocab_size}: "
            "teacher and student must share one tokenizer; gather them again"
        )
