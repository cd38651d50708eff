"""A student's tensors while they are trained: float32 master copies of the tensors that a scope names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from compressors.model.description.feed_forward import Routed
from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import Kind, TensorSpec
from compressors.model.running.gradients import ParameterKey
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, factors_name
from compressors.model.running.trained_experts import (
    BasedMatrices,
    Fade,
    LowRankMatrices,
    ScaledMatrices,
    TrainedExperts,
    TrainedMatrices,
    WholeMatrices,
)
from compressors.model.sources.adapters import adapter_tensors
from compressors.model.sources.student import Student
from compressors.recover.scopes import BlockLength, Scope, is_routers, scaled_matrices

__all__ = ["TrainedStudent"]


class TrainedStudent:
    """The trained tensors of a student; the student is not changed.

    Args:
        student: the model that is trained.
        scope: the tensors that are trained.
        usage: number of tokens that chose each expert, by layer: [E] each
            (:func:`~compressors.recover.scopes.expert_usage`); only a scope of the most used experts needs it.
        block_length: lengths of blocks in the student's file; only a scope of block scales needs it.
        seed: seed of the adapters' initial values.
        device: the device of the tensors.

    Raises:
        InputError: the scope does not fit the student.
        ValueError: the scope needs ``usage`` or ``block_length``, and there is none.
    """

    def __init__(
        self,
        student: Student,
        scope: Scope,
        *,
        usage: Sequence[torch.Tensor] | None = None,
        block_length: BlockLength | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        scope.check_against(student.spec)
        if scope.n_experts and usage is None:
            raise ValueError("the most used experts are known by their usage")
        self.student = student
        self._device = device
        self._generator = torch.Generator().manual_seed(seed)
        self._whole = {
            (role, layer): self._parameter(student.tensor(role, layer).float().clone())
            for role, layer in _whole_tensors(scope, student.spec)
        }
        self._factors: dict[tuple[Role, int | None], torch.Tensor] = {}
        self._experts: dict[int, TrainedExperts] = {}
        self._below = student  # what the trained tensors stand in for
        self.fade = Fade()
        if scope.scales:
            if block_length is None:
                raise ValueError("the lengths of blocks are those of a file")
            self._add_factors(block_length)
        elif scope.bases:
            self._below = student.with_originals()
            self._add_replaced_experts()
        elif scope.n_experts != 0:
            self._add_experts(scope, usage)

    @property
    def parameters(self) -> dict[ParameterKey, torch.Tensor]:
        """All trained tensors, in a fixed order."""
        parameters: dict[ParameterKey, torch.Tensor] = {}
        for (role, layer), tensor in self._whole.items():
            parameters[role, layer] = tensor
        for (role, layer), factors in self._factors.items():
            parameters[factors_name(role), layer] = factors
        for layer, experts in self._experts.items():
            parameters |= {(name, layer): tensor for name, tensor in experts.tensors.items()}
        return parameters

    def streamed(self, limit: MemoryLimit | None) -> StreamedModel:
        """The student with these tensors in place of its own; it sees their changes."""
        return StreamedModel(
            self._below,
            trainable=self._whole,
            factors=self._factors,
            trained_experts=self._experts,
            limit=limit,
            device=self._device,
        )

    def overlay(self) -> dict[str, torch.Tensor]:
        """The tensors as they are now, by their name in the student; later training does not change these copies.

        Routers, norms and biases are float32. Matrices go back to storage dtype, and adapters stay adapters
        (:mod:`compressors.model.sources.adapters`). Factors of blocks are not among them: they belong to a file
        (:meth:`factors`).
        """
        overlay = {
            self.student.name(role, layer): tensor.detach().to("cpu", self._overlay_dtype(role, layer), copy=True)
            for (role, layer), tensor in self._whole.items()
        }
        for layer, trained in self._experts.items():
            if isinstance(trained.down, BasedMatrices):
                overlay |= self._of_bases(layer, trained)
            elif not isinstance(trained.down, ScaledMatrices):
                for row, expert in enumerate(trained.experts):
                    overlay |= self._of_expert(layer, row, expert, trained)
        return overlay

    def is_router(self, key: ParameterKey) -> bool:
        """True if a trained tensor is part of a layer's router."""
        return any((role, layer) == key for role, layer in self._whole if is_routers(self._described(role, layer)))

    def whole(self) -> Iterator[tuple[Role, int | None, torch.Tensor]]:
        """Yields role, layer and float32 values of each tensor that is trained whole, except experts."""
        for (role, layer), tensor in self._whole.items():
            yield role, layer, tensor.detach().cpu()

    def factors(self) -> Iterator[tuple[Role, int, torch.Tensor]]:
        """Yields role, layer and each block's factor, float32 [rows, blocks of a row], with the rows of all experts."""
        for (role, layer), factors_RK in self._factors.items():
            assert layer is not None
            yield role, layer, factors_RK.detach().cpu()
        for layer, trained in self._experts.items():
            assert isinstance(trained.gate_up, ScaledMatrices) and isinstance(trained.down, ScaledMatrices)
            roles = (*self._routed(layer).input_roles, Role.EXPERT_DOWN)
            for role, factors_NOK in zip(roles, trained.gate_up.factors + trained.down.factors, strict=True):
                if factors_NOK is not None:
                    yield role, layer, factors_NOK.detach().cpu().flatten(0, 1)

    def _add_factors(self, block_length: BlockLength) -> None:
        """Adds a factor of one for each block."""
        for index, layer in enumerate(self.student.spec.layers):
            of_experts: dict[Role, torch.Tensor | None] = {}
            for tensor in scaled_matrices(layer):
                length = block_length(tensor.role, index)
                n_rows, n_columns = layer.dimensions(tensor)
                if tensor.is_per_expert:
                    size = (layer.n_experts, n_rows)
                    of_experts[tensor.role] = None if length is None else self._ones(*size, n_columns // length)
                elif length is not None:
                    self._factors[tensor.role, index] = self._ones(n_rows, n_columns // length)
            if any(factors is not None for factors in of_experts.values()):
                of_inputs = tuple(of_experts[role] for role in self._routed(index).input_roles)
                of_down, experts = (of_experts[Role.EXPERT_DOWN],), tuple(range(layer.n_experts))
                self._experts[index] = TrainedExperts(experts, ScaledMatrices(of_inputs), ScaledMatrices(of_down))

    def _add_experts(self, scope: Scope, usage: Sequence[torch.Tensor] | None) -> None:
        for index, layer in enumerate(self.student.spec.layers):
            if layer.n_experts:
                chosen = scope.experts(torch.zeros(layer.n_experts) if usage is None else usage[index])
                self._experts[index] = self._trained_experts(index, chosen, scope.adapter_rank)

    def _add_replaced_experts(self) -> None:
        for index in range(self.student.spec.n_layers):
            shared = self.student.shared(index)
            if shared is not None:
                gate_up = self._based(index, shared, self._routed(index).input_roles)
                down = self._based(index, shared, (Role.EXPERT_DOWN,))
                self._experts[index] = TrainedExperts(shared.replaced, gate_up, down, self.fade)

    def _based(self, layer: int, shared: SharedBases, roles: tuple[Role, ...]) -> BasedMatrices:
        """The bases of these roles' matrices, one under the other, and the adapters on them."""
        student, rows = self.student, self.student.spec.dimensions(roles[0], layer)
        bases = [
            torch.cat([student.base(role, layer, base) for role in roles]).float() for base in range(shared.n_bases)
        ]
        base_MOI = torch.stack(bases) if bases else torch.zeros(0, len(roles) * rows[0], rows[1])
        pairs = [[student.adapter(role, layer, expert) for role in roles] for expert in shared.replaced]
        a_NPRI, b_NPOR = (
            torch.stack([torch.stack([pair[factor] for pair in of_expert]) for of_expert in pairs]) for factor in (0, 1)
        )
        own = LowRankMatrices(self._parameter(a_NPRI.float().clone()), self._parameter(b_NPOR.float().clone()))
        base_of = tuple(base for base in shared.base_of if base is not None)
        return BasedMatrices(self._parameter(base_MOI), base_of, own)

    @torch.no_grad()
    def _of_bases(self, layer: int, trained: TrainedExperts) -> dict[str, torch.Tensor]:
        """The overlay of a layer's bases and adapters."""
        student, overlay = self.student, {}
        of_each = ((self._routed(layer).input_roles, trained.gate_up), ((Role.EXPERT_DOWN,), trained.down))
        for roles, matrices in of_each:
            assert isinstance(matrices, BasedMatrices), "all experts that stand on bases are trained so"
            for base, matrix_OI in enumerate(matrices.base_MOI):
                for role, part_OI in zip(roles, matrix_OI.chunk(len(roles)), strict=True):
                    name = student.base_name(role, layer, base)
                    overlay[name] = part_OI.to("cpu", student.expert_dtype, copy=True)
            for row, expert in enumerate(trained.experts):
                factors = (tensor[row].to("cpu", copy=True) for tensor in (matrices.own.a_NPRI, matrices.own.b_NPOR))
                overlay |= adapter_tensors(student.name(roles[0], layer, expert), *factors)
        return overlay

    @torch.no_grad()
    def _of_expert(self, layer: int, row: int, expert: int, trained: TrainedExperts) -> dict[str, torch.Tensor]:
        """The overlay of the ``row``-th trained expert of a layer."""
        student, roles = self.student, self._routed(layer).input_roles
        overlay: dict[str, torch.Tensor] = {}
        for of_matrix, matrices in ((roles, trained.gate_up), ((Role.EXPERT_DOWN,), trained.down)):
            names = [student.name(role, layer, expert) for role in of_matrix]
            if isinstance(matrices, LowRankMatrices):
                factors = (tensor[row].to("cpu", copy=True) for tensor in (matrices.a_NPRI, matrices.b_NPOR))
                overlay |= adapter_tensors(names[0], *factors)
            elif isinstance(matrices, WholeMatrices):
                parts = matrices.weight_NOI[row].chunk(len(names))
                overlay |= {
                    name: part_OI.to("cpu", student.expert_dtype, copy=True)
                    for name, part_OI in zip(names, parts, strict=True)
                }
        return overlay

    def _trained_experts(self, layer: int, experts: tuple[int, ...], rank: int | None) -> TrainedExperts:
        if rank is None:
            gate_up = torch.stack([self._gate_up(layer, expert).float() for expert in experts])
            down = torch.stack([self.student.expert(Role.EXPERT_DOWN, layer, expert).float() for expert in experts])
            return TrainedExperts(
                experts, WholeMatrices(self._parameter(gate_up)), WholeMatrices(self._parameter(down))
            )
        described = self.student.spec.layers[layer]
        size, width, n = described.expert_size, described.expert_width, len(experts)
        n_parts = len(self._routed(layer).input_roles)
        return TrainedExperts(
            experts,
            self._adapters((n, n_parts, rank, size), (n, n_parts, width, rank)),
            self._adapters((n, 1, rank, width), (n, 1, size, rank)),
        )

    def _adapters(self, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> TrainedMatrices:
        """Makes adapters with A uniform up to 1 / sqrt(inputs), as in a linear layer, and B zero: no change yet."""
        a_NPRI = (2 * torch.rand(a_shape, generator=self._generator) - 1) / a_shape[-1] ** 0.5
        return LowRankMatrices(self._parameter(a_NPRI), self._parameter(torch.zeros(b_shape)))

    def _gate_up(self, layer: int, expert: int) -> torch.Tensor:
        return torch.cat([self.student.expert(role, layer, expert) for role in self._routed(layer).input_roles])

    def _routed(self, layer: int) -> Routed:
        routed = self.student.spec.layers[layer].routed
        assert routed is not None, f"layer {layer} has no experts"
        return routed

    def _described(self, role: Role, layer: int | None) -> TensorSpec:
        return self.student.spec.tensor(role, layer)

    def _overlay_dtype(self, role: Role, layer: int | None) -> torch.dtype:
        is_matrix = self._described(role, layer).kind is Kind.MATRIX
        return self.student.dtype(role, layer) if is_matrix else torch.float32

    def _ones(self, *size: int) -> nn.Parameter:
        return self._parameter(torch.ones(size))

    def _parameter(self, values: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(self._device))


def _whole_tensors(scope: Scope, spec: ModelSpec) -> Iterator[tuple[Role, int | None]]:
    """Yields the tensors that a scope trains whole, except experts: routers first."""
    tensors = [(tensor, index) for index, layer in enumerate(spec.layers) for tensor in layer.shared_tensors]
    trained = [(tensor, layer) for tensor, layer in tensors if scope.trains(tensor)]
    for tensor, layer in sorted(trained, key=lambda place: not is_routers(place[0])):
        yield tensor.role, layer
    for tensor in spec.tensors:
        if scope.trains(tensor):
            yield tensor.role, None
