"""Student-Aware Router (SAR): with all experts on, the teacher's routers learn to predict what the student can follow.

"Every Expert Matters" (arXiv 2502.12947). For each batch of texts that the student wrote,

1. the teacher's routers alone take an AdamW step on

       L_SAR = D_KL(q_student || p_all) + beta L_b,   L_b = CV(importance)^2 + CV(load)^2

   with every expert on;
2. the student minimises D_KL(q_student || p_SAR) with the updated routers, every expert on.

The paper's routers have a second matrix, W_noise, which the families here lack: only W_g is trained. Without noise,
and with every expert on, each expert's load is the number of tokens: CV(load) is zero. An expert's importance is the
sum of its gates over the batch (Shazeer et al., arXiv 1701.06538, equation 6); L_b is summed over layers, and CV is
the coefficient of variation with the population's variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from compressors.model.parallel import reduce_sum, share
from compressors.model.predictions.losses import reverse_kl_divergence
from compressors.model.running.expert_choice import AllExperts, ExpertChoice
from compressors.model.running.gradients import ParameterKey, streamed_gradients
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.not_finite import NotFiniteError
from compressors.model.running.routers import RoutedCall, watching
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.student import Student
from compressors.recover.on_policy import OnPolicyDistillation, divergence_from_states, sampled_weights
from compressors.recover.optimizer_state import optimizer_state, restore_optimizer
from compressors.recover.schedule import Schedule
from compressors.recover.scopes import Scope
from compressors.recover.trained_student import TrainedStudent

__all__ = ["BALANCE", "ROUTER_LEARNING_RATE", "StudentAwareRouter", "squared_variation", "teacher_router_gradients"]

BALANCE = 0.01
"""The paper's beta."""

ROUTER_LEARNING_RATE = 1e-5
"""The paper's rate, for routers and student alike."""


class StudentAwareRouter(OnPolicyDistillation):
    """SAR as an objective. It trains its own copies of the teacher's routers: the teacher's files do not change.

    With several batches in a round the routers take a step for each, before the teacher judges them all.

    Args:
        student: the model that is trained; the teacher is its source.
        schedule: the training's schedule.
        batches_per_round: the number of batches of texts that are written together; one as published.
        router_learning_rate: the learning rate of the teacher's routers.
        balance: beta.
        limit: memory that this process may use.
        dtype: the dtype of the arithmetic; the routers, their gradients and the optimizer are float32.
        device: the device on which layers compute.

    Raises:
        UnsupportedError: the student's final norm or head is not the teacher's.
    """

    def __init__(
        self,
        student: Student,
        schedule: Schedule,
        *,
        batches_per_round: int = 1,
        router_learning_rate: float = ROUTER_LEARNING_RATE,
        balance: float = BALANCE,
        limit: MemoryLimit | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        trained = TrainedStudent(Student.teacher(student.source), Scope.routers(), device=device)
        teacher = trained.streamed(limit)
        teacher.choice = AllExperts(teacher.spec.n_experts)
        super().__init__(student, teacher, schedule, batches_per_round=batches_per_round, dtype=dtype)
        self._routers = trained.parameters
        self._balance = balance
        self._optimizer = torch.optim.AdamW(self._routers.values(), lr=router_learning_rate, weight_decay=0.0)

    def state(self) -> dict[str, torch.Tensor]:
        """The state, with the teacher's routers and Adam's moments of them."""
        return super().state() | optimizer_state(self._optimizer, self._named_routers())

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continues from a :meth:`state`."""
        super().restore(tensors)
        restore_optimizer(self._optimizer, self._named_routers(), tensors)

    def _choice(self, texts: Sequence[tuple[int, int]], n_tokens: int) -> ExpertChoice:
        return AllExperts(self._teacher.spec.n_experts)

    def _prepare(self, model: StreamedModel) -> None:
        """Does the first phase for each batch of the round."""
        sizes = [len(batch_BT) for batch_BT in self._batches()]
        groups = [
            TokenGroup(batch_BT[share(size)], dtype=self._dtype)
            for batch_BT, size in zip(self._batches(), sizes, strict=True)
        ]
        of_student = model.stream(groups)
        model.release()
        for group, student, size in zip(groups, of_student, sizes, strict=True):
            states_BTD = student.read(slice(0, len(student)))
            _, gradients = teacher_router_gradients(
                self._teacher, group.tokens_BT, states_BTD, size, self._balance, self._dtype
            )
            for key, router in self._routers.items():
                router.grad = gradients[key]
            norm = nn.utils.get_total_norm(list(gradients.values())).item()
            if not math.isfinite(norm):
                raise NotFiniteError("the gradients of the teacher's routers became NaN or infinite")
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._teacher.release()

    def _named_routers(self) -> dict[str, torch.Tensor]:
        return {f"router.{layer}": router for (_, layer), router in self._routers.items()}


def teacher_router_gradients(
    teacher: StreamedModel,
    texts_BT: torch.Tensor,
    student_BTD: torch.Tensor,
    n_texts: int,
    balance: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, dict[ParameterKey, torch.Tensor]]:
    """Computes L_SAR of a batch and its gradient with respect to the teacher's routers, summed over all processes.

    The squared coefficient of variation is not a sum over tokens. Its importances are complete after the forward pass;
    in the backward pass each token's gates get their share of the gradient, dL/dI_e.

    Args:
        teacher: the teacher, with all experts on and trainable routers.
        texts_BT: this process's texts of the batch.
        student_BTD: the student's states after the last layer.
        n_texts: the number of texts of the batch, over all processes.
        balance: beta.
        dtype: the dtype of the arithmetic.

    Raises:
        NotFiniteError: a hidden state is NaN or infinite.
    """
    importance = _Importance(teacher)

    def router_loss(layer: int, _blocks: slice, logits_TE: torch.Tensor) -> torch.Tensor:
        _, slope_E = squared_variation(importance.totals[layer])
        # over all tokens this sums to zero, since the variation does not change with the importances' scale
        return balance * (logits_TE.softmax(-1) @ slope_E.to(logits_TE)).sum()

    def divergence(teacher_nV: torch.Tensor, student_nV: torch.Tensor) -> torch.Tensor:
        return reverse_kl_divergence(student_nV, teacher_nV)

    total, gradients = streamed_gradients(
        teacher,
        texts_BT,
        None,
        dtype,
        router_loss,
        divergence_from_states(divergence, student_BTD, sampled_weights(len(texts_BT), texts_BT.shape[1], n_texts)),
        [importance.observe],
    )
    summed = torch.tensor(total, dtype=torch.float64)
    reduce_sum([summed, *gradients.values()])
    variations = [squared_variation(total_E)[0] for total_E in importance.totals.values()]
    return summed.item() + balance * sum(variations), gradients


def squared_variation(importance_E: torch.Tensor) -> tuple[float, torch.Tensor]:
    """CV^2 = E sum I^2 / (sum I)^2 - 1 of the importances, and its gradient with respect to them."""
    n_experts, total, squares = len(importance_E), importance_E.sum(), importance_E.square().sum()
    slope_E = 2 * n_experts * (importance_E - squares / total) / total**2
    return (n_experts * squares / total**2 - 1).item(), slope_E


class _Importance:
    """Sums the gates of each expert over a forward pass of all processes, by layer: float64 [E]."""

    def __init__(self, teacher: StreamedModel) -> None:
        self._spec = teacher.spec
        self.totals: dict[int, torch.Tensor] = {}

    @contextmanager
    def observe(self, index: int, layer: nn.Module) -> Iterator[None]:
        routed = self._spec.layers[index].routed
        if routed is None:
            yield
            return
        total_E = self.totals[index] = torch.zeros(routed.n_experts, dtype=torch.float64)

        def see(call: RoutedCall) -> None:
            total_E.add_(call.weights_TK.double().sum(0).cpu())  # all experts, in order

        with watching(layer, routed, see):
            yield
        reduce_sum([total_E])
