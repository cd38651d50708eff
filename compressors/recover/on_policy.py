"""Distillation from a live teacher on texts that the student writes, the common part of KA and SAR.

"Every Expert Matters" (arXiv 2502.12947) has the student continue a prompt, and the teacher judge every token of the
continuation: the loss is the reverse divergence KL(student || teacher) at temperature 1. Here a training block's first
half is the prompt, and its second half is written by the student.

Student and teacher take turns, so that they never share memory: for one or more batches the student writes its texts,
then the teacher reads them, then the student takes its steps. With one batch in a round that is the published method;
with more, the texts come from the student of a few steps before, and each model is read less often.

The teacher's judgement is kept as its hidden states after the last layer, because student and teacher share final norm
and head. So the divergence is exact, over the full vocabulary, and takes no more memory than the hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch

from compressors.model.description.roles import Role
from compressors.model.description.routing import Score
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError
from compressors.model.parallel import reduce_sum, share
from compressors.model.predictions.losses import reverse_kl_divergence
from compressors.model.predictions.next_token import random_numbers
from compressors.model.running.expert_choice import ExpertChoice
from compressors.model.running.gradients import Head, StateLoss
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.student import Student
from compressors.recover.objectives import StepLoss
from compressors.recover.sampling import sample_texts
from compressors.recover.schedule import Schedule

__all__ = ["OnPolicyDistillation", "divergence_from_states", "sampled_weights"]

_TEXTS = 0  # keys of random numbers begin with their purpose


class OnPolicyDistillation(ABC):
    """The student's reverse divergence from a live teacher, on texts of its own.

    Args:
        student: the model that is trained; only its size and its head matter here.
        teacher: the student's source, streamed.
        schedule: the training's schedule. Its ``updates_per_batch`` is the number of steps that the student takes on
            one text.
        batches_per_round: batches that are written, and judged, together.
        dtype: the dtype of the arithmetic.

    Raises:
        UnsupportedError: the student's final norm or head is not the teacher's, or the scores of the teacher's routers
            are not probabilities.
    """

    def __init__(
        self,
        student: Student,
        teacher: StreamedModel,
        schedule: Schedule,
        *,
        batches_per_round: int,
        dtype: torch.dtype,
    ) -> None:
        _check_head(student)
        _check_routers(teacher.spec)
        self._teacher = teacher
        self._schedule = schedule
        self._dtype = dtype
        self._steps = schedule.steps()
        self._steps_per_round = batches_per_round * schedule.updates_per_batch
        self._n_done = 0
        self._texts_BT = torch.zeros(0, 0, dtype=torch.int64)  # the round's batches, one after the other
        self._targets: HiddenStates | None = None  # this process's share of each of the round's steps

    @abstractmethod
    def _choice(self, texts: Sequence[tuple[int, int]], n_tokens: int) -> ExpertChoice:
        """The teacher's choice of experts for texts of ``n_tokens`` tokens, given as (step, place in it) in order."""

    @abstractmethod
    def _prepare(self, model: StreamedModel) -> None:
        """Prepares the teacher for the texts of a new round; releases the student's weights again."""

    def of_step(self, model: StreamedModel, tokens_BT: torch.Tensor, blocks: Sequence[int], n_blocks: int) -> StepLoss:
        """The reverse divergence, averaged over the tokens that the student wrote."""
        step = self._n_done
        if step % self._steps_per_round == 0:
            self._targets = None
            self._texts_BT = self._write(model, tokens_BT)
            model.release()
            self._prepare(model)
        if self._targets is None:
            self._targets = self._judge()
            self._teacher.release()
        mine_BT = self._of_step(step)[share(n_blocks)]
        first = sum(len(share(len(self._steps[earlier]))) for earlier in range(self._round(step).start, step))
        targets_BTD = self._targets.read(slice(first, first + len(blocks)))
        weights_N = sampled_weights(len(blocks), mine_BT.shape[1], n_blocks)
        self._n_done += 1
        loss = divergence_from_states(reverse_kl_divergence, targets_BTD, weights_N)
        return StepLoss(of_states=loss, tokens_BT=mine_BT)

    def state(self) -> dict[str, torch.Tensor]:
        """The number of steps done and the round's texts, which the teacher judges once more after :meth:`restore`."""
        return {"n_done": torch.tensor(self._n_done), "texts": self._texts_BT}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continues from a :meth:`state`."""
        self._n_done = int(tensors["n_done"])
        self._texts_BT = tensors["texts"].clone()
        self._targets = None

    def _round(self, step: int) -> range:
        """The steps of the round that a step is in."""
        start = step - step % self._steps_per_round
        return range(start, min(start + self._steps_per_round, len(self._steps)))

    def _batches(self) -> Sequence[torch.Tensor]:
        """The texts of the round, those of all processes: int64 [B, T] each."""
        return torch.split(self._texts_BT, self._schedule.blocks_per_step)

    def _of_step(self, step: int) -> torch.Tensor:
        """The texts of a step of this round."""
        return self._batches()[(step - self._round(step).start) // self._schedule.updates_per_batch]

    def _write(self, model: StreamedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Writes the texts of the next round; each process writes its share, and every process gets all."""
        first_steps = self._round(self._n_done)[:: self._schedule.updates_per_batch]
        blocks = torch.cat([self._steps[step] for step in first_steps])
        keys = [(step, place) for step in first_steps for place in range(len(self._steps[step]))]
        mine, n_prompt = share(len(blocks)), tokens_BT.shape[1] // 2
        n_new = tokens_BT.shape[1] - n_prompt
        uniform_BN = torch.stack([random_numbers((_TEXTS, self._schedule.seed, *key), n_new) for key in keys])[mine]
        texts_BT = torch.zeros(len(blocks), tokens_BT.shape[1], dtype=torch.int64)
        if mine:
            texts_BT[mine] = sample_texts(model, tokens_BT[blocks[mine], :n_prompt], uniform_BN, self._dtype)
        reduce_sum([texts_BT])
        return texts_BT

    def _judge(self) -> HiddenStates:
        """Returns the teacher's last hidden states for this process's texts of each step of the round."""
        steps = self._round(self._n_done)
        texts = [(step, place) for step in steps for place in share(len(self._steps[step]))]
        tokens_BT = torch.cat([self._of_step(step)[share(len(self._steps[step]))] for step in steps])
        self._teacher.choice = self._choice(texts, tokens_BT.shape[1])
        (states,) = self._teacher.stream([TokenGroup(tokens_BT, dtype=self._dtype)])
        return states


def sampled_weights(n_mine: int, n_tokens: int, n_blocks: int) -> torch.Tensor:
    """The weight of each position of this process's texts, 0 unless the student wrote the next token: float32 [N]."""
    first, stop = n_tokens // 2 - 1, n_tokens - 1
    weights_BT = torch.zeros(n_mine, n_tokens)
    weights_BT[:, first:stop] = 1.0 / (n_blocks * (stop - first))
    return weights_BT.flatten()


def divergence_from_states(
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], others_BTD: torch.Tensor, weights_N: torch.Tensor
) -> StateLoss:
    """The weighted sum of a divergence between two models that share final norm and head.

    Args:
        divergence: takes the logits of the trained model and of the other one, both [n, V], and returns [n].
        others_BTD: the other model's states after the last layer.
        weights_N: the weights of the flattened positions; where one is 0 no logits are computed.
    """
    others_ND = others_BTD.flatten(0, 1)

    def loss(positions: slice, states_nD: torch.Tensor, head: Head) -> torch.Tensor:
        counted = weights_N[positions].nonzero()[:, 0]
        logits_nV = head(states_nD[counted]).float().cpu()
        others_nV = head(others_ND[positions][counted].to(states_nD.device)).float().cpu()
        return (divergence(logits_nV, others_nV) * weights_N[positions][counted]).sum()

    return loss


def _check_head(student: Student) -> None:
    head = Role.TOKEN_EMBEDDING if student.spec.tied_embeddings else Role.HEAD
    for role in (Role.FINAL_NORM, head):
        if student.name(role) in student.overlay:
            raise UnsupportedError(
                f"a live teacher's knowledge is kept in front of the {role}, which is no longer the teacher's in this "
                "student: recover by KA or SAR before the head is changed, or by another objective"
            )


def _check_routers(teacher: ModelSpec) -> None:
    """Refuses routers whose scores are not probabilities: KA samples, and SAR balances, those of a softmax."""
    for index, layer in enumerate(teacher.layers):
        if layer.routed is not None and layer.routed.routing.score is Score.SIGMOID:
            raise UnsupportedError(
                f"KA and SAR are defined for routers with a softmax, but layer {index} has sigmoids: recover by "
                "another objective, such as kd"
            )
