"""Decoder layers' weights: read from the student into buffers of our own, one layer ahead of the computation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from compressors.model.description.roles import Role
from compressors.model.description.tensors import Kind
from compressors.model.errors import InputError
from compressors.model.sources.student import Student

__all__ = ["LayerReader", "LayerWeights", "layer_bytes", "refuse_not_finite"]


@dataclass
class LayerWeights:
    """One decoder layer, in storage dtype; without a MoE sub-layer both arrays are empty."""

    gate_up_EFD: torch.Tensor  # [E, 2F, D], gate rows first; [E, F, D] of experts without a gate
    down_EDF: torch.Tensor
    others: dict[Role, torch.Tensor] = field(default_factory=dict)


def layer_bytes(student: Student) -> int:
    """Bytes of the largest decoder layer in storage dtype."""
    return max(layer.parameters for layer in student.spec.blocks) * student.expert_dtype.itemsize


class LayerReader:
    """Reads layers into buffers that are used again and again.

    Args:
        student: the source of the weights.
        n_resident: the number of first layers that stay in memory once they were read.
        read_ahead: the other layers take turns in two buffers, so that one is read while the other computes; if False,
            they share one buffer.
        check_finite: refuse NaN and infinite weights.
    """

    def __init__(self, student: Student, *, n_resident: int, read_ahead: bool, check_finite: bool) -> None:
        self._student = student
        self._n_resident = n_resident
        self._n_shared = 2 if read_ahead else 1
        self._check_finite = check_finite
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # room for any layer's gate and up, and down
        self._weights: dict[int, LayerWeights] = {}  # the weights in the buffers, by layer
        self._holds: dict[int, int] = {}  # buffer -> layer

    def visit(self, order: Sequence[int]) -> Iterator[tuple[int, LayerWeights]]:
        """Yields each layer of ``order`` with its weights, which are valid until the next one is asked for.

        Raises:
            InputError: a weight cannot be read, or is not finite.
        """
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[LayerWeights] | None = None
            for position, index in enumerate(order):
                weights = self._read(index) if ahead is None else ahead.result()
                following = order[position + 1] if position + 1 < len(order) else None
                ahead = None
                if following is not None and self._slot(following) != self._slot(index):
                    ahead = pool.submit(self._read, following)
                yield index, weights

    def release(self) -> None:
        """Frees the buffers of layers that are not resident."""
        for slot in [slot for slot in self._buffers if slot < 0]:
            del self._buffers[slot], self._weights[slot], self._holds[slot]

    def _slot(self, index: int) -> int:
        """Returns a layer's buffer: resident layers have their own, neighbours among the others have different ones."""
        return index if index < self._n_resident else -1 - index % self._n_shared

    def _read(self, index: int) -> LayerWeights:
        slot = self._slot(index)
        if self._holds.get(slot) != index:
            if slot not in self._buffers:
                self._buffers[slot] = self._new_buffer()
            self._holds.pop(slot, None)
            self._weights[slot] = self._fill(self._buffers[slot], index)
            self._holds[slot] = index
        return self._weights[slot]

    def _new_buffer(self) -> tuple[torch.Tensor, torch.Tensor]:
        spec, dtype = self._student.spec, self._student.expert_dtype
        n_gate_up = max(layer.n_experts * layer.expert_input_rows * layer.expert_size for layer in spec.blocks)
        n_down = max(layer.n_experts * layer.expert_width * layer.expert_size for layer in spec.blocks)
        return torch.empty(n_gate_up, dtype=dtype), torch.empty(n_down, dtype=dtype)

    def _fill(self, buffer: tuple[torch.Tensor, torch.Tensor], index: int) -> LayerWeights:
        student, layer = self._student, self._student.spec.blocks[index]
        n_experts, width, size = layer.n_experts, layer.expert_width, layer.expert_size
        rows = layer.expert_input_rows
        weights = LayerWeights(
            buffer[0][: n_experts * rows * size].view(n_experts, rows, size),
            buffer[1][: n_experts * width * size].view(n_experts, size, width),
        )
        for tensor in (tensor for tensor in layer.shared_tensors if tensor.kind is not Kind.TABLE):
            weights.others[tensor.role] = student.tensor(tensor.role, index)
            self._check(weights.others[tensor.role], tensor.role, index)
        for expert in range(n_experts):
            assert layer.routed is not None
            matrices = weights.gate_up_EFD[expert].split(width)
            of_inputs = list(zip(layer.routed.input_roles, matrices, strict=True))
            for role, out in (*of_inputs, (Role.EXPERT_DOWN, weights.down_EDF[expert])):
                student.read_expert(role, index, expert, out)
                self._check(out, role, index, expert)
        return weights

    def _check(self, values: torch.Tensor, role: Role, layer: int, expert: int | None = None) -> None:
        if self._check_finite:
            refuse_not_finite(self._student, values, role, layer, expert)


def refuse_not_finite(
    student: Student, values: torch.Tensor, role: Role, layer: int | None = None, expert: int | None = None
) -> None:
    """Refuses NaN and infinity.

    Raises:
        InputError: a value is not finite; the message names the tensor.
    """
    # a sum shows NaN and infinity without a temporary; a sum that overflows is looked at again
    if not torch.isfinite(values.sum(dtype=torch.float32)) and not torch.isfinite(values).all():
        name = student.name(role, layer, expert)
        raise InputError(f"{student.source.path}: tensor {name} holds NaN or infinite values")
