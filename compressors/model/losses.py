"""Token losses: recovery trains on them, validation reports them. All in nats and float32."""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["kl_divergence", "kl_divergence_to_top", "negative_log_likelihood"]


def negative_log_likelihood(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """-log p(target) at each position: float32 [N]."""
    return functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def kl_divergence(teacher_log_probs_NV: torch.Tensor, logits_NV: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the full vocabulary at each position: float32 [N].

    Args:
        teacher_log_probs_NV: the teacher's log-probabilities; -inf contributes nothing.
        logits_NV: the student's logits.
    """
    student = functional.log_softmax(logits_NV.float(), dim=-1)
    terms = teacher_log_probs_NV.exp() * (teacher_log_probs_NV - student)
    return terms.masked_fill(teacher_log_probs_NV == -torch.inf, 0.0).sum(-1)


def kl_divergence_to_top(
    top_log_probs_NK: torch.Tensor, top_tokens_NK: torch.Tensor, logits_NV: torch.Tensor
) -> torch.Tensor:
    """KL(teacher || student) with all tokens outside the teacher's top K merged into one bucket: float32 [N].

    By the log-sum inequality this is a lower bound of the full divergence; its gradient never pulls single tail tokens.

    Args:
        top_log_probs_NK: log-probabilities of the teacher's K most probable tokens.
        top_tokens_NK: their ids.
        logits_NV: the student's logits.
    """
    student = functional.log_softmax(logits_NV.float(), dim=-1)
    student_top = student.gather(-1, top_tokens_NK)
    student_rest = student.scatter(-1, top_tokens_NK, -torch.inf).logsumexp(-1)
    top = top_log_probs_NK.exp()
    rest = (1.0 - top.sum(-1)).clamp_min(torch.finfo(torch.float32).tiny)
    return (top * (top_log_probs_NK - student_top)).sum(-1) + rest * (rest.log() - student_rest)
