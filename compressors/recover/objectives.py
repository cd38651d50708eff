"""The objectives of training: divergence from the teacher, the next token's loss, or the distance of router logits.

All are means over the tokens of a step, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from compressors.calibration.teacher import TeacherTargets
from compressors.model.errors import InputError
from compressors.model.predictions.losses import kl_divergence_to_top, negative_log_likelihood
from compressors.model.running.gradients import Loss, RouterLoss, StateLoss
from compressors.model.running.routers import RoutedCall, watching
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.student import Student

__all__ = ["Distillation", "NextToken", "Objective", "RouterLogitMatching", "Stateless", "StepLoss"]


@dataclass(frozen=True)
class StepLoss:
    """The parts of a step's loss; their sum over all processes is the mean over the step."""

    of_logits: Loss | None = None
    of_routers: RouterLoss | None = None
    of_states: StateLoss | None = None  # replaces ``of_logits``
    tokens_BT: torch.Tensor | None = None  # the texts that the student reads; None: the step's blocks


class Objective(Protocol):
    """A loss that training makes smaller."""

    def of_step(self, model: StreamedModel, tokens_BT: torch.Tensor, blocks: Sequence[int], n_blocks: int) -> StepLoss:
        """The loss of this process's part of the next step.

        Args:
            model: the student as it is now.
            tokens_BT: all training blocks.
            blocks: the blocks that this process works on.
            n_blocks: the number of blocks of the step, over all processes.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """The state that the next :meth:`of_step` depends on beside its arguments."""

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continues from a :meth:`state`."""


class Stateless:
    """The state of an objective that remembers nothing between steps."""

    def state(self) -> dict[str, torch.Tensor]:
        """Returns nothing."""
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Does nothing."""


class Distillation(Stateless):
    """Router KD's loss at temperature 1: Hyeon and Do, "Is Retraining-Free Enough?" (arXiv 2603.02217), equation 3,

        L = 1/N sum_t KL(teacher(. | x_<=t) || student(. | x_<=t))

    over the N positions that have a next token. It is that method if only routers are trained: the choice of the top-k
    is not differentiated, the gradient reaches a router through the gates of the chosen experts. The teacher is read
    from its cached targets, so it need not be in memory.

    Tokens other than the teacher's most probable ones are one bucket
    (:func:`compressors.model.predictions.losses.kl_divergence_to_top`).

    Args:
        targets: the teacher's predictions at every position of the training blocks.
        student: the model that is trained, for its vocabulary.

    Raises:
        InputError: raised by :meth:`of_step` if the teacher names a token that the student does not have.
    """

    def __init__(self, targets: TeacherTargets, student: Student) -> None:
        self._targets = targets
        self._vocab_size = student.spec.vocab_size

    def of_step(self, model: StreamedModel, tokens_BT: torch.Tensor, blocks: Sequence[int], n_blocks: int) -> StepLoss:
        """The divergence, averaged over the positions that have a next token."""
        n_tokens = tokens_BT.shape[1]
        log_probs, top = self._targets.of_blocks(blocks, n_tokens)
        if top.numel() and int(top.max()) >= self._vocab_size:
            raise InputError(
                f"the teacher's targets name token {int(top.max())}, but the student's vocabulary has "
                f"{self._vocab_size}: teacher and student must share one tokenizer; gather the targets again"
            )
        weights = _position_weights(len(blocks), n_tokens, n_blocks)

        def loss(positions: slice, logits_NV: torch.Tensor) -> torch.Tensor:
            divergence = kl_divergence_to_top(log_probs[positions], top[positions], logits_NV)
            return (divergence * weights[positions]).sum()

        return StepLoss(of_logits=loss)


class NextToken(Stateless):
    """Cross-entropy of the text's own next token, without a teacher."""

    def of_step(self, model: StreamedModel, tokens_BT: torch.Tensor, blocks: Sequence[int], n_blocks: int) -> StepLoss:
        """The negative log-likelihood, averaged over the positions that have a next token."""
        mine_BT = tokens_BT[list(blocks)]
        following = mine_BT.roll(-1, dims=1).flatten()  # nothing follows the last position: its weight is zero
        weights = _position_weights(len(mine_BT), mine_BT.shape[1], n_blocks)

        def loss(positions: slice, logits_NV: torch.Tensor) -> torch.Tensor:
            return (negative_log_likelihood(logits_NV, following[positions]) * weights[positions]).sum()

        return StepLoss(of_logits=loss)


class RouterLogitMatching(Stateless):
    """Mean squared difference between the student's router logits and the teacher's logits of the retained experts.

    A baseline of Hyeon and Do, "Beyond Retraining-Free MoE Compression" (arXiv 2609.06076): the mean over a layer's
    experts and tokens, then over layers. A merged expert is compared with the expert it comes from. Only the student's
    own hidden states enter its routers, so the gradient also reaches the layers in front.

    Args:
        teacher: the original model, streamed over the tokens of each step.
        student: the model that is trained.
        dtype: the dtype of the teacher's arithmetic; router logits are float32.
    """

    def __init__(self, teacher: StreamedModel, student: Student, dtype: torch.dtype = torch.float32) -> None:
        self._teacher = teacher
        self._student = student
        self._dtype = dtype
        self._layers = {layer.source: index for index, layer in enumerate(student.experts.layers) if layer.groups}

    def of_step(self, model: StreamedModel, tokens_BT: torch.Tensor, blocks: Sequence[int], n_blocks: int) -> StepLoss:
        """The squared difference, averaged over experts, tokens and layers."""
        n_tokens = tokens_BT.shape[1]
        wanted = self._teacher_logits(tokens_BT[list(blocks)])
        weight = 1.0 / (n_blocks * n_tokens * len(self._layers))

        def loss(layer: int, part: slice, logits_TE: torch.Tensor) -> torch.Tensor:
            wanted_TE = wanted[layer][part.start * n_tokens : part.stop * n_tokens].to(logits_TE.device)
            return (logits_TE - wanted_TE).square().mean(-1).sum() * weight

        return StepLoss(of_routers=loss)

    def _teacher_logits(self, tokens_BT: torch.Tensor) -> dict[int, torch.Tensor]:
        """Router logits by the student's layers with experts: float32 [tokens, student's experts]."""
        found: dict[int, list[torch.Tensor]] = {index: [] for index in self._layers.values()}

        @contextmanager
        def observe(source: int, layer: nn.Module) -> Iterator[None]:
            if source not in self._layers:
                yield
                return
            index = self._layers[source]
            kept = list(self._student.experts.layers[index].kept)

            def see(call: RoutedCall) -> None:
                found[index].append(call.logits_TE[:, kept].float().cpu())

            routed = self._teacher.spec.layers[source].routed
            assert routed is not None
            with watching(layer, routed, see):
                yield

        self._teacher.stream([TokenGroup(tokens_BT, [observe], self._dtype)])
        return {index: torch.cat(parts) for index, parts in found.items() if parts}


def _position_weights(n_mine: int, n_tokens: int, n_blocks: int) -> torch.Tensor:
    """The weight of each position of this process's blocks, 0 for a block's last: float32 [N]."""
    weights = torch.full((n_mine, n_tokens), 1.0 / (n_blocks * (n_tokens - 1)))
    weights[:, -1] = 0.0
    return weights.flatten()
