"""Router KD: the routers of a compressed model learn to predict what the original model predicts.

Hyeon and Do, "Is Retraining-Free Enough?" (arXiv 2603.02217), equation 3, at temperature 1:

    L = 1/N sum_t KL(teacher(. | x_<=t) || student(. | x_<=t))

over the N positions that have a next token. Everything but the routers is frozen; the choice of the top-k is not
differentiated, the gradient reaches a router through the gate weights of the chosen experts. The teacher is read from
its cached targets, so it need not be in memory.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from compressors.model.memory import MemoryLimit
from compressors.model.student import Student
from compressors.recover.objectives import Distillation
from compressors.recover.schedule import Schedule
from compressors.recover.training import Training
from compressors.recover.training import train as train_routers
from compressors.teacher import TeacherTargets

__all__ = ["RouterKdSettings", "RouterTraining", "train_routers"]


class RouterKdSettings(Schedule):
    """The schedule, as published or for a model's size."""

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


class RouterTraining(Training):
    """Router KD as published: nothing but the routers, by the divergence from the teacher's cached targets.

    The arguments are those of :class:`~compressors.recover.training.Training`.
    """

    def __init__(
        self,
        student: Student,
        tokens_BT: torch.Tensor,
        targets: TeacherTargets,
        settings: Schedule,
        *,
        limit: MemoryLimit | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            student,
            tokens_BT,
            Distillation(targets, student),
            settings,
            limit=limit,
            dtype=dtype,
            device=device,
        )
