"""How far a student is from its teacher on a split that no training sees: what a rung of the ladder is judged by."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compressors.model.errors import InputError
from compressors.model.log_probs import LogProbReader
from compressors.model.losses import kl_divergence
from compressors.model.memory import MemoryLimit
from compressors.model.parallel import reduce_sum, share
from compressors.model.streaming import StreamedModel, TokenGroup
from compressors.model.student import Student
from compressors.teacher import by_block

__all__ = ["mean_divergence"]


@torch.no_grad()
def mean_divergence(
    student: Student,
    tokens_BT: torch.Tensor,
    teacher: LogProbReader,
    scored: slice,
    progress: Callable[[int], None] | None = None,
    limit: MemoryLimit | None = None,
    device: torch.device | None = None,
) -> float:
    """Mean full-vocabulary KL(teacher || student) in nats over the scored positions of the blocks.

    Args:
        student: the model that is judged, in float32.
        tokens_BT: int64 token blocks.
        teacher: log-probabilities at the scored positions, block after block.
        scored: positions of each block.
        progress: called with 1 after each layer.
        limit: memory that this process may use.
        device: where layers compute.

    Raises:
        InputError: teacher and student have different vocabularies.
    """
    _check_vocabulary(teacher, student)
    model = StreamedModel(student, limit=limit, device=device)
    mine = share(len(tokens_BT))
    (hidden,) = model.stream([TokenGroup(tokens_BT[mine])], progress)
    n_scored = scored.stop - scored.start
    total = torch.zeros((), dtype=torch.float64)
    for positions, logits in model.logits_in_chunks(hidden, scored):
        for place, rows in by_block(positions, n_scored, mine):
            log_probs = teacher.rows(place, place + rows.stop - rows.start)
            total += kl_divergence(log_probs, logits[rows]).sum().double()
    model.release()
    reduce_sum([total])
    mean: float = total.item() / (len(tokens_BT) * n_scored)
    return mean


def _check_vocabulary(teacher: LogProbReader, student: Student) -> None:
    n_tokens, vocab_size = teacher.rows(0, 1).shape[1], student.shape.vocab_size
    if n_tokens != vocab_size:
        raise InputError(
            f"the teacher's log-probabilities are of {n_tokens} tokens, but the student's vocabulary has {vocab_size}: "
            "teacher and student must share one tokenizer; gather them again"
        )
