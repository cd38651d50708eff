"""A student's tensors while they are trained: float32 master copies of what a scope names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from compressors.model.families import Role
from compressors.model.gradients import ParameterKey
from compressors.model.memory import MemoryLimit
from compressors.model.streaming import StreamedModel
from compressors.model.student import Student
from compressors.model.trained_experts import LowRankMatrices, TrainedExperts, TrainedMatrices, WholeMatrices
from compressors.recover.scopes import Scope

__all__ = ["TrainedStudent"]


class TrainedStudent:
    """The trained tensors of a student; the student is not changed.

    Args:
        student: what is trained.
        scope: which of its tensors.
        usage: how many tokens chose each expert, by layer: [E] each (:func:`~compressors.recover.scopes.expert_usage`);
            only a scope of the most used experts needs it.
        seed: of the adapters' beginning.
        device: where the tensors lie.

    Raises:
        InputError: the scope does not fit the student.
        ValueError: the scope needs ``usage``, and there is none.
    """

    def __init__(
        self,
        student: Student,
        scope: Scope,
        *,
        usage: Sequence[torch.Tensor] | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        scope.check_against(student.shape)
        if scope.n_experts and usage is None:
            raise ValueError("the most used experts are known by their usage")
        self.student = student
        self._device = device
        self._generator = torch.Generator().manual_seed(seed)
        layers = [layer for layer in range(student.shape.n_layers) if student.shape.layer(layer).has_moe]
        self._routers = {
            (Role.ROUTER, layer): self._parameter(student.tensor(Role.ROUTER, layer).float().clone())
            for layer in layers
        }
        self._experts: dict[int, TrainedExperts] = {}
        if scope.n_experts != 0:
            for layer in layers:
                n_experts = student.shape.layer(layer).n_experts
                chosen = scope.experts(torch.zeros(n_experts) if usage is None else usage[layer])
                self._experts[layer] = self._trained_experts(layer, chosen, scope.adapter_rank)

    @property
    def parameters(self) -> dict[ParameterKey, torch.Tensor]:
        """All trained tensors, in a fixed order."""
        parameters: dict[ParameterKey, torch.Tensor] = {}
        for (role, layer), router in self._routers.items():
            parameters[role, layer] = router
        for layer, experts in self._experts.items():
            parameters |= {(name, layer): tensor for name, tensor in experts.tensors.items()}
        return parameters

    def streamed(self, limit: MemoryLimit | None) -> StreamedModel:
        """The student with these tensors in place of its own; it follows them when they change."""
        return StreamedModel(
            self.student, trainable=self._routers, trained_experts=self._experts, limit=limit, device=self._device
        )

    def overlay(self) -> dict[str, torch.Tensor]:
        """The tensors as they are now, by their name in the student; later training does not change these copies.

        Routers are float32. Experts go back to storage dtype, adapters merged into them.
        """
        overlay = {
            self.student.name(role, layer): router.detach().cpu().clone()
            for (role, layer), router in self._routers.items()
        }
        for layer, trained in self._experts.items():
            for expert in trained.experts:
                overlay |= self._merged(layer, expert, trained)
        return overlay

    @torch.no_grad()
    def _merged(self, layer: int, expert: int, trained: TrainedExperts) -> dict[str, torch.Tensor]:
        student, dtype = self.student, self.student.expert_dtype
        gate_up = trained.gate_up_weight(expert, self._gate_up(layer, expert).to(self._device))
        down = trained.down_weight(expert, student.expert(Role.EXPERT_DOWN, layer, expert).to(self._device))
        gate, up = gate_up.chunk(2)
        matrices = {Role.EXPERT_GATE: gate, Role.EXPERT_UP: up, Role.EXPERT_DOWN: down}
        return {
            student.name(role, layer, expert): matrix.to("cpu", dtype, copy=True) for role, matrix in matrices.items()
        }

    def _trained_experts(self, layer: int, experts: tuple[int, ...], rank: int | None) -> TrainedExperts:
        if rank is None:
            gate_up = torch.stack([self._gate_up(layer, expert).float() for expert in experts])
            down = torch.stack([self.student.expert(Role.EXPERT_DOWN, layer, expert).float() for expert in experts])
            return TrainedExperts(
                experts, WholeMatrices(self._parameter(gate_up)), WholeMatrices(self._parameter(down))
            )
        shape = self.student.shape.layer(layer)
        hidden_size, width, n = shape.hidden_size, shape.expert_width, len(experts)
        return TrainedExperts(
            experts,
            self._adapters((n, 2, rank, hidden_size), (n, 2, width, rank)),
            self._adapters((n, 1, rank, width), (n, 1, hidden_size, rank)),
        )

    def _adapters(self, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> TrainedMatrices:
        """A as a linear layer begins, uniform up to 1 / sqrt(inputs), and B zero: at first the student is unchanged."""
        a_NPRI = (2 * torch.rand(a_shape, generator=self._generator) - 1) / a_shape[-1] ** 0.5
        return LowRankMatrices(self._parameter(a_NPRI), self._parameter(torch.zeros(b_shape)))

    def _gate_up(self, layer: int, expert: int) -> torch.Tensor:
        gate, up = (self.student.expert(role, layer, expert) for role in (Role.EXPERT_GATE, Role.EXPERT_UP))
        return torch.cat([gate, up])

    def _parameter(self, values: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(self._device))
