"""Router KD: the routers of a compressed model learn to predict what the original model predicts.

Hyeon and Do, "Is Retraining-Free Enough?" (arXiv 2603.02217), equation 3, at temperature 1:

    L = 1/N sum_t KL(teacher(. | x_<=t) || student(. | x_<=t))

over the N positions that have a next token. Everything but the routers is frozen; the choice of the top-k is not
differentiated, the gradient reaches a router through the gate weights of the chosen experts. The teacher is read from
its cached targets, so it need not be in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from compressors.model.errors import InputError
from compressors.model.families import Role
from compressors.model.log_probs import LogProbReader
from compressors.model.losses import kl_divergence, kl_divergence_to_top
from compressors.model.memory import MemoryLimit
from compressors.model.parallel import reduce_sum, share
from compressors.model.streaming import StreamedModel, TokenGroup
from compressors.model.student import Student
from compressors.teacher import TeacherTargets, by_block

__all__ = ["RouterKdSettings", "RouterTraining", "mean_divergence", "router_overlay", "train_routers"]


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


class RouterTraining:
    """The schedule, a step at a time; what :func:`train_routers` runs.

    In a torch.distributed group every process takes its share of each step's blocks, and gradients are summed.

    Args:
        student: the compressed model; it is not changed.
        tokens_BT: int64 training blocks.
        targets: the teacher's most probable next tokens at every position of these blocks.
        settings: the schedule; its ``n_blocks`` must not exceed the blocks given.
        limit: memory that this process may use; layers that fit stay between steps.
        dtype: of the arithmetic; routers, their gradients and the optimizer are float32.
        device: where layers compute.

    Raises:
        InputError: there are fewer blocks than the schedule wants.
    """

    def __init__(
        self,
        student: Student,
        tokens_BT: torch.Tensor,
        targets: TeacherTargets,
        settings: RouterKdSettings,
        *,
        limit: MemoryLimit | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        if settings.n_blocks > len(tokens_BT):
            raise InputError(
                f"Router KD wants {settings.n_blocks} blocks of {tokens_BT.shape[1]} tokens, but the calibration text "
                f"yields {len(tokens_BT)}: give more text, or a smaller number in the recipe"
            )
        self.settings = settings
        self.n_done = 0  # steps
        self._student = student
        self._tokens_BT = tokens_BT
        self._targets = targets
        self._dtype = dtype
        self._routers = {
            (Role.ROUTER, layer): nn.Parameter(student.tensor(Role.ROUTER, layer).float().clone().to(device))
            for layer in range(student.shape.n_layers)
            if student.shape.layer(layer).has_moe
        }
        self._model = StreamedModel(student, trainable=self._routers, limit=limit, device=device)
        self._optimizer = torch.optim.AdamW(self._routers.values(), lr=settings.learning_rate, weight_decay=0.0)
        order = torch.randperm(settings.n_blocks, generator=torch.Generator().manual_seed(settings.seed))
        self._steps = order.split(settings.blocks_per_step)

    def step(self) -> float:
        """Does the next step; returns its mean loss in nats."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.rate_at(self.n_done)
        loss, gradients = self._gradients(self._steps[self.n_done])
        for key, parameter in self._routers.items():
            parameter.grad = gradients[key]
        nn.utils.clip_grad_norm_(self._routers.values(), self.settings.max_gradient_norm)
        self._optimizer.step()
        self.n_done += 1
        return loss

    def overlay(self) -> dict[str, torch.Tensor]:
        """The routers as they are now, by their name in the student."""
        return router_overlay(self._student, {layer: value for (_, layer), value in self._routers.items()})

    def release(self) -> None:
        """Lets the student's weights go, which further steps would read again; the routers stay."""
        self._model.release()

    def taught(self) -> Student:
        """The student with these routers."""
        return self._student.with_overlay(self.overlay())

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, to be given to :meth:`restore`."""
        tensors = {"n_done": torch.tensor(self.n_done)}
        for (_, layer), router in self._routers.items():
            tensors[f"{layer}.router"] = router.detach().cpu()
            for name, value in self._optimizer.state[router].items():
                tensors[f"{layer}.{name}"] = value.cpu()
        return tensors

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Goes on from a :meth:`state`: the steps that follow are those that would have followed there."""
        self.n_done = int(tensors["n_done"])
        for (_, layer), router in self._routers.items():
            router.data.copy_(tensors[f"{layer}.router"])
            prefix = f"{layer}."
            self._optimizer.state[router] = {
                name.removeprefix(prefix): value.clone() if name == f"{prefix}step" else value.clone().to(router.device)
                for name, value in tensors.items()
                if name.startswith(prefix) and name != f"{layer}.router"
            }

    def _gradients(self, blocks: torch.Tensor) -> tuple[float, dict[tuple[Role, int], torch.Tensor]]:
        """Mean loss and router gradients of one step; the last position of a block predicts nothing."""
        mine = blocks[share(len(blocks))]
        n_tokens = self._tokens_BT.shape[1]
        weight = 1.0 / (len(blocks) * (n_tokens - 1))
        top_log_probs, top_tokens = self._targets.of_blocks(mine.tolist(), n_tokens)
        weights = torch.full((len(mine), n_tokens), weight)
        weights[:, -1] = 0.0
        weights = weights.flatten()

        def loss(positions: slice, logits_NV: torch.Tensor) -> torch.Tensor:
            divergence = kl_divergence_to_top(top_log_probs[positions], top_tokens[positions], logits_NV)
            return (divergence * weights[positions]).sum()

        total, gradients = self._model.gradients(self._tokens_BT[mine], loss, self._dtype)
        summed = torch.tensor(total, dtype=torch.float64)
        reduce_sum([summed, *gradients.values()])
        return summed.item(), gradients


def train_routers(
    training: RouterTraining,
    *,
    progress: Callable[[int], None] | None = None,
    after_step: Callable[[RouterTraining], None] | None = None,
) -> Student:
    """Does all steps that are not done yet and returns the student with its new float32 routers.

    Args:
        training: the schedule and how far it is.
        progress: called after each step with 1.
        after_step: called after each step but the last, to keep its state.
    """
    while training.n_done < training.settings.n_steps:
        training.step()
        if progress is not None:
            progress(1)
        if after_step is not None and training.n_done < training.settings.n_steps:
            after_step(training)
    training.release()
    return training.taught()


def router_overlay(student: Student, routers: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Overlay entries for routers given by layer: float32 [E, D]."""
    return {student.name(Role.ROUTER, layer): weight.detach().float().cpu() for layer, weight in routers.items()}


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
    """
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
