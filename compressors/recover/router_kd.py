"""Router KD: the routers of a compressed model learn to predict what the original model predicts.

Hyeon and Do, "Is Retraining-Free Enough?" (arXiv 2603.02217), equation 3, at temperature 1:

    L = 1/N sum_t KL(teacher(. | x_<=t) || student(. | x_<=t))

over the N positions that have a next token. Everything but the routers is frozen; the choice of the top-k is not
differentiated, the gradient reaches a router through the gate weights of the chosen experts. The teacher is read from
its cached targets, so it need not be in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from compressors.model.errors import InputError
from compressors.model.families import Role
from compressors.model.log_probs import LogProbReader
from compressors.model.losses import kl_divergence, kl_divergence_to_top
from compressors.model.streaming import StreamedModel, TokenGroup
from compressors.model.student import Student
from compressors.teacher import TeacherTargets

__all__ = ["RouterKdSettings", "mean_divergence", "router_overlay", "train_routers"]


@dataclass(frozen=True)
class RouterKdSettings:
    """The schedule: AdamW without weight decay, linear warm-up, linear decay to zero, one epoch."""

    n_blocks: int
    learning_rate: float
    blocks_per_step: int = 8
    warmup_ratio: float = 0.03
    max_gradient_norm: float = 1.0
    seed: int = 42

    PUBLISHED_BLOCKS: ClassVar[int] = 3000

    @classmethod
    def published(cls, n_blocks: int = PUBLISHED_BLOCKS) -> RouterKdSettings:
        """The paper's schedule: 3,000 texts of 512 tokens, 2 x 4 texts a step (375 steps), learning rate 5e-5."""
        return cls(n_blocks=n_blocks, learning_rate=5e-5)

    @classmethod
    def sized(cls, hidden_size: int, n_blocks: int, seed: int) -> RouterKdSettings:
        """Fewer, larger steps for a model of this hidden size.

        An Adam step moves each of the ``hidden_size`` weights of a router row by about the learning rate, so a router
        logit moves in proportion to the hidden size: the rate that suits 256 (3e-3, chosen on a selection split) is
        scaled by its inverse.
        """
        return cls(n_blocks=n_blocks, learning_rate=3e-3 * 256 / hidden_size, seed=seed)

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the one epoch; the last may have fewer blocks."""
        return math.ceil(self.n_blocks / self.blocks_per_step)

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0 ... n_steps - 1."""
        warmup = math.ceil(self.warmup_ratio * self.n_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (self.n_steps - step) / max(1, self.n_steps - warmup)


def train_routers(
    student: Student,
    tokens_BT: torch.Tensor,
    targets: TeacherTargets,
    settings: RouterKdSettings,
    *,
    keep_layers: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> Student:
    """Runs the schedule and returns the student with its new float32 routers.

    Args:
        student: the compressed model; it is not changed.
        tokens_BT: int64 training blocks.
        targets: the teacher's most probable next tokens at every position of these blocks.
        settings: the schedule; its ``n_blocks`` must not exceed the blocks given.
        keep_layers: keep all layers in memory between steps, when the model fits.
        progress: called after each step with (1, mean loss of the step).

    Raises:
        InputError: there are fewer blocks than the schedule wants.
    """
    if settings.n_blocks > len(tokens_BT):
        raise InputError(
            f"Router KD wants {settings.n_blocks} blocks of {tokens_BT.shape[1]} tokens, but the calibration text "
            f"yields {len(tokens_BT)}: give more text, or a smaller number in the recipe"
        )
    routers = {
        (Role.ROUTER, layer): nn.Parameter(student.tensor(Role.ROUTER, layer).float().clone())
        for layer in range(student.shape.n_layers)
    }
    model = StreamedModel(student, trainable=routers, keep_layers=keep_layers)
    optimizer = torch.optim.AdamW(routers.values(), lr=settings.learning_rate, weight_decay=0.0)
    order = torch.randperm(settings.n_blocks, generator=torch.Generator().manual_seed(settings.seed))
    for step, blocks in enumerate(order.split(settings.blocks_per_step)):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(step)
        loss, gradients = _step(model, tokens_BT[blocks], targets, blocks)
        for key, parameter in routers.items():
            parameter.grad = gradients[key]
        nn.utils.clip_grad_norm_(routers.values(), settings.max_gradient_norm)
        optimizer.step()
        if progress is not None:
            progress(1, loss)
    return student.with_overlay(router_overlay(student, {key[1]: value for key, value in routers.items()}))


def _step(
    model: StreamedModel, tokens_BT: torch.Tensor, targets: TeacherTargets, blocks: torch.Tensor
) -> tuple[float, dict[tuple[Role, int], torch.Tensor]]:
    """Mean loss and router gradients of one step. The last position of a block predicts nothing and has no loss."""
    top_log_probs = targets.log_probs_BTK[blocks].flatten(0, 1)
    top_tokens = targets.tokens_BTK[blocks].flatten(0, 1).long()
    predicts = torch.ones(tokens_BT.shape)
    predicts[:, -1] = 0.0
    weights = predicts.flatten() / predicts.sum()

    def loss(positions: slice, logits_NV: torch.Tensor) -> torch.Tensor:
        divergence = kl_divergence_to_top(top_log_probs[positions], top_tokens[positions], logits_NV)
        return (divergence * weights[positions]).sum()

    return model.gradients(tokens_BT, loss)


def router_overlay(student: Student, routers: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Overlay entries for routers given by layer: float32 [E, D]."""
    return {student.name(Role.ROUTER, layer): weight.detach().float() for layer, weight in routers.items()}


@torch.no_grad()
def mean_divergence(
    student: Student,
    tokens_BT: torch.Tensor,
    teacher: LogProbReader,
    scored: slice,
    progress: Callable[[int], None] | None = None,
) -> float:
    """Mean full-vocabulary KL(teacher || student) in nats over the scored positions of the blocks.

    ``teacher`` holds the same positions, block after block; ``progress`` is called with 1 after each layer.
    """
    model = StreamedModel(student)
    (states,) = model.stream([TokenGroup(tokens_BT)], progress)
    hidden = states[:, scored].flatten(0, 1)
    total = 0.0
    for positions, logits in model.logits_in_chunks(hidden):
        total += kl_divergence(teacher.rows(positions.start, positions.stop), logits).sum().item()
    return total / len(hidden)
