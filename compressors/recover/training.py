"""Trains a student step by step: a schedule, an objective, and the tensors that a scope names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compressors.model.errors import InputError
from compressors.model.parallel import reduce_sum, share
from compressors.model.running.gradients import ParameterKey, streamed_gradients
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.not_finite import NotFiniteError
from compressors.model.sources.student import Student
from compressors.recover.objectives import Objective
from compressors.recover.optimizer_state import optimizer_state, restore_optimizer
from compressors.recover.schedule import Schedule
from compressors.recover.scopes import BlockLength, Scope
from compressors.recover.trained_student import TrainedStudent
from compressors.recover.training_memory import refuse_too_large, training_bytes

__all__ = ["Training", "TrainingDivergedError", "train"]

_OF_OBJECTIVE = "objective."


class TrainingDivergedError(InputError):
    """Loss or gradients became NaN or infinite. The student is unchanged."""


class Training:
    """A training and its progress.

    In a torch.distributed group every process takes its share of each step's blocks, and gradients are summed.

    Args:
        student: the compressed model; it is not changed.
        tokens_BT: int64 training blocks.
        objective: the loss that becomes smaller.
        settings: the schedule; its ``n_blocks`` must not exceed the blocks given.
        scope: the tensors that are trained.
        usage: the number of tokens that chose each expert, by layer; needed for a scope of the most used experts.
        block_length: lengths of blocks in the student's file; needed for a scope of block scales.
        limit: memory that this process may use; layers that fit stay between steps.
        dtype: the dtype of the arithmetic; trained tensors, their gradients and the optimizer are float32.
        device: the device on which layers compute.

    Raises:
        InputError: there are fewer blocks than the schedule needs or than one step takes, a token is not in the
            student's vocabulary, or the scope does not fit the student.
        TooLargeError: the training does not fit the limit.
    """

    def __init__(
        self,
        student: Student,
        tokens_BT: torch.Tensor,
        objective: Objective,
        settings: Schedule,
        *,
        scope: Scope | None = None,
        usage: Sequence[torch.Tensor] | None = None,
        block_length: BlockLength | None = None,
        limit: MemoryLimit | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        scope = scope or Scope.routers()
        settings.check_against(tokens_BT)
        _check_vocabulary(tokens_BT, student)
        if limit is not None and scope != Scope.routers():
            refuse_too_large(scope, student.spec, student.expert_dtype.itemsize, limit.n_bytes, block_length)
        self.settings = settings
        self.n_done = 0  # steps
        self._student = student
        self._tokens_BT = tokens_BT
        self._objective = objective
        self._dtype = dtype
        self.trained = TrainedStudent(
            student, scope, usage=usage, block_length=block_length, seed=settings.seed, device=device
        )
        self._parameters = self.trained.parameters
        if limit is not None:  # gradients and moments are still to come
            later = training_bytes(scope, student.spec, block_length).later
            limit = replace(limit, n_bytes=max(1, limit.n_bytes - later))
        self._model = self.trained.streamed(limit)
        self._optimizer = torch.optim.AdamW(self._groups(scope.router_rate(student.spec.hidden_size)), weight_decay=0.0)
        self._steps = settings.steps()

    def step(self) -> float:
        """Does the next step; returns its mean loss.

        Raises:
            TrainingDivergedError: the loss or a gradient is NaN or infinite; nothing was changed by this step.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.rate_at(self.n_done) * group["share"]
        self.trained.fade.share = self.settings.replaced_share_at(self.n_done)
        try:
            loss, gradients = self._gradients(self._steps[self.n_done])
        except NotFiniteError as error:
            if self.n_done == 0:
                raise  # training is not at fault
            raise self._diverged(str(error)) from error
        for key, parameter in self._parameters.items():
            parameter.grad = gradients[key]
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self.settings.max_gradient_norm).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._diverged(f"the loss is {loss}, the norm of the gradients {norm}")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.n_done += 1
        return loss

    def overlay(self) -> dict[str, torch.Tensor]:
        """The trained tensors as they are now, by their name in the student; later steps do not change these copies."""
        return self.trained.overlay()

    def release(self) -> None:
        """Frees the student's weights, which further steps read again; trained tensors stay."""
        self._model.release()

    def taught(self) -> Student:
        """The student with these tensors."""
        return self._student.with_overlay(self.overlay())

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, for :meth:`restore`; the next step changes it."""
        tensors = {"n_done": torch.tensor(self.n_done)}
        tensors |= optimizer_state(self._optimizer, self._named_parameters())
        return tensors | {_OF_OBJECTIVE + name: value for name, value in self._objective.state().items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continues from a :meth:`state`, with the same steps that would have followed there."""
        self.n_done = int(tensors["n_done"])
        restore_optimizer(self._optimizer, self._named_parameters(), tensors)
        of_objective = [name for name in tensors if name.startswith(_OF_OBJECTIVE)]
        self._objective.restore({name.removeprefix(_OF_OBJECTIVE): tensors[name] for name in of_objective})

    def _groups(self, router_rate: float) -> list[dict[str, Any]]:
        """The optimizer's groups, with their share of the schedule's rate."""
        shares: dict[float, list[torch.Tensor]] = {}
        for key, parameter in self._parameters.items():
            shares.setdefault(router_rate if self.trained.is_router(key) else 1.0, []).append(parameter)
        return [{"params": parameters, "share": share} for share, parameters in shares.items()]

    def _named_parameters(self) -> dict[str, torch.Tensor]:
        return {f"{layer}.{name}": parameter for (name, layer), parameter in self._parameters.items()}

    def _gradients(self, blocks: torch.Tensor) -> tuple[float, dict[ParameterKey, torch.Tensor]]:
        """Mean loss and gradients of one step."""
        mine = blocks[share(len(blocks))].tolist()
        loss = self._objective.of_step(self._model, self._tokens_BT, mine, len(blocks))
        tokens_BT = self._tokens_BT[mine] if loss.tokens_BT is None else loss.tokens_BT
        total, gradients = streamed_gradients(
            self._model, tokens_BT, loss.of_logits, self._dtype, loss.of_routers, loss.of_states
        )
        summed = torch.tensor(total, dtype=torch.float64)
        reduce_sum([summed, *gradients.values()])
        return summed.item(), gradients

    def _diverged(self, what: str) -> TrainingDivergedError:
        return TrainingDivergedError(
            f"step {self.n_done + 1} of {self.settings.n_steps} of recovery failed: {what}; lower the learning rate "
            f"(it is {self.settings.learning_rate:g}), or recover in float32. The student before recovery is unharmed"
        )


def train(
    training: Training,
    *,
    progress: Callable[[int], None] | None = None,
    after_step: Callable[[Training], None] | None = None,
) -> Student:
    """Does all steps that are left and returns the trained student.

    Args:
        training: the training.
        progress: called after each step with 1.
        after_step: called after each step but the last, to keep its state.

    Raises:
        TrainingDivergedError: a step made NaN or infinite values.
    """
    while training.n_done < training.settings.n_steps:
        training.step()
        if progress is not None:
            progress(1)
        if after_step is not None and training.n_done < training.settings.n_steps:
            after_step(training)
    training.release()
    return training.taught()


def _check_vocabulary(tokens_BT: torch.Tensor, student: Student) -> None:
    largest = int(tokens_BT.max())
    if largest >= student.spec.vocab_size:
        raise InputError(
            f"the training text has token {largest}, but the student's vocabulary has {student.spec.vocab_size}: "
            "text and student must share one tokenizer"
        )
