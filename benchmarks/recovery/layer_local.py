"""Layer-local router training: every router learns alone to reproduce its layer's output. Nothing sees the next token.

For each decoder layer, and hidden states x that enter it in the teacher,

    L = mean over tokens and channels of (student_layer(x) - teacher_layer(x))^2

Attention is the same on both sides and x is added to both, so the difference is that of the two MoE outputs. No
gradient leaves a layer: no head, no stored inputs, no backward pass through the model. The product does not offer it;
it is measured here because it is the cheapest thing that could be called router recovery.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compressors.model.description.roles import Role
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.student import Student
from compressors.recover.schedule import Schedule
from compressors.recover.scopes import Scope
from compressors.recover.trained_student import TrainedStudent

__all__ = ["train_routers_locally"]


def train_routers_locally(source: Student, student: Student, tokens_BT: torch.Tensor, schedule: Schedule) -> Student:
    """The student with routers that were trained layer by layer, each by all steps of the schedule.

    Args:
        source: the teacher; the student has the same layers and the same attention.
        student: what is trained.
        tokens_BT: int64 training blocks; the schedule says which of them a step takes.
        schedule: of every layer.
    """
    teacher, trained = StreamedModel(source), TrainedStudent(student, Scope.routers())
    taught = trained.streamed(None)
    (inputs,) = teacher.first_states([TokenGroup(tokens_BT[: schedule.n_blocks])])
    layers = range(student.spec.n_layers)
    for (layer, weights), (_, student_weights) in zip(teacher.weights(layers), taught.weights(layers), strict=True):
        outputs = HiddenStates(inputs.shape, torch.float32)
        teacher.run(layer, weights, inputs, outputs)
        with taught.layer(layer, student_weights) as module:
            _Local(taught, module, inputs, outputs).train(trained.parameters[Role.ROUTER, layer], schedule)
        inputs = outputs
    return student.with_overlay(trained.overlay())


@dataclass(frozen=True)
class _Local:
    """One layer, and what it should make of what."""

    model: StreamedModel
    module: nn.Module
    inputs: HiddenStates
    outputs: HiddenStates

    def train(self, router_ED: torch.Tensor, schedule: Schedule) -> None:
        optimizer = torch.optim.AdamW([router_ED], lr=schedule.learning_rate, weight_decay=0.0)
        for step, blocks in enumerate(schedule.steps()):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(step)
            made_BTD = self.model.run_layer(self.module, _blocks(self.inputs, blocks))
            (made_BTD - _blocks(self.outputs, blocks)).square().mean().backward()
            nn.utils.clip_grad_norm_([router_ED], schedule.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _blocks(states: HiddenStates, blocks: torch.Tensor) -> torch.Tensor:
    return torch.cat([states.read(slice(block, block + 1)) for block in blocks.tolist()])
