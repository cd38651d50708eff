"""Token losses: recovery trains on them, validation reports them. All in nats and float32."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

__all__ = ["kl_divergence", "kl_divergence_to_top", "negative_log_likelihood", "reverse_kl_divergence"]


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
    divergence_N: torch.Tensor = _DivergenceToTop.apply(logits_NV.float(), top_log_probs_NK, top_tokens_NK)  # type: ignore[no-untyped-call]
    return divergence_N


def reverse_kl_divergence(logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) over the full vocabulary at each position: float32 [N]. Gradients reach both.

    Args:
        logits_NV: the student's logits.
        teacher_logits_NV: the teacher's.
    """
    divergence_N: torch.Tensor = _ReverseDivergence.apply(logits_NV.float(), teacher_logits_NV.float())  # type: ignore[no-untyped-call]
    return divergence_N


class _ReverseDivergence(torch.autograd.Function):
    """The divergence D = sum q log(q / p), with q of the student and p of the teacher.

    Its gradient with respect to the student's logits is q (log(q / p) - D), to the teacher's p - q. Written out,
    because autograd would hold several arrays of the logits' size.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor) -> torch.Tensor:
        log_student_NV = functional.log_softmax(logits_NV, dim=-1)
        log_teacher_NV = functional.log_softmax(teacher_logits_NV, dim=-1)
        divergence_N = (log_student_NV.exp() * (log_student_NV - log_teacher_NV)).sum(-1)
        ctx.save_for_backward(log_student_NV, log_teacher_NV, divergence_N)
        return divergence_N

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        log_student_NV, log_teacher_NV, divergence_N = ctx.saved_tensors
        gradient_N1, student_NV = gradients[0][:, None], log_student_NV.exp()
        of_student = of_teacher = None
        if ctx.needs_input_grad[0]:
            of_student = (
                (log_student_NV - log_teacher_NV).sub_(divergence_N[:, None]).mul_(student_NV).mul_(gradient_N1)
            )
        if ctx.needs_input_grad[1]:
            of_teacher = log_teacher_NV.exp().sub_(student_NV).mul_(gradient_N1)
        return of_student, of_teacher


class _DivergenceToTop(torch.autograd.Function):
    """The divergence sum p log(p / q) + r log(r / s), with p and q of the top tokens, r and s of the rest.

    Its gradient with respect to a logit is q - p for a top token and q (1 - r / s) for another. Written out, because
    autograd would hold several arrays of the logits' size.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, top_log_probs_NK: torch.Tensor, top_tokens_NK: torch.Tensor
    ) -> torch.Tensor:
        student_NV = torch.softmax(logits_NV, dim=-1)
        log_sums = logits_NV.logsumexp(-1, keepdim=True)
        student_top_log_NK = logits_NV.gather(-1, top_tokens_NK) - log_sums
        student_NV.scatter_(-1, top_tokens_NK, 0.0)
        tiny = torch.finfo(torch.float32).tiny
        student_rest = student_NV.sum(-1, keepdim=True).clamp_min(tiny)
        top_NK = top_log_probs_NK.exp()
        rest = (1.0 - top_NK.sum(-1, keepdim=True)).clamp_min(tiny)
        ctx.save_for_backward(student_NV, student_top_log_NK, student_rest, top_NK, rest, top_tokens_NK)
        of_top = (top_NK * (top_log_probs_NK - student_top_log_NK)).sum(-1)
        return of_top + (rest * (rest.log() - student_rest.log()))[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        student_NV, student_top_log_NK, student_rest, top_NK, rest, top_tokens_NK = ctx.saved_tensors
        gradient_NV = student_NV * (1.0 - rest / student_rest)
        gradient_NV.scatter_(-1, top_tokens_NK, student_top_log_NK.exp() - top_NK)
        return gradient_NV.mul_(gradients[0][:, None]), None, None
