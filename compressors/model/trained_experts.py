"""Float32 tensors that stand in for experts' weights while they are trained.

An expert has two matrices as transformers fuses them: gate and up [2F, D], and down [D, F]. Each is trained whole, or
through a low-rank adapter on top of the stored matrix.

Letters: N trained experts of a layer, O outputs and I inputs of a matrix, n tokens of one expert, R rank,
P parts of a fused matrix (2: gate and up; 1: down).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["LowRankMatrices", "TrainedExperts", "TrainedMatrices", "WholeMatrices"]


class TrainedMatrices(Protocol):
    """One of the two matrices of N experts of a layer."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What is trained, by name: float32, the experts first."""

    def weight(self, row: int, stored_OI: torch.Tensor) -> torch.Tensor:
        """What stands in for the ``row``-th trained expert's stored matrix: float32 [O, I]."""

    def add_gradients(
        self, sums: Sequence[torch.Tensor], row: int, output_gradient_nO: torch.Tensor, inputs_nI: torch.Tensor
    ) -> None:
        """Adds the gradients that a product ``inputs @ weight.T`` gives; ``sums`` are in the order of the tensors."""


@dataclass(frozen=True)
class WholeMatrices:
    """The matrices themselves."""

    weight_NOI: torch.Tensor

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The one tensor."""
        return {"weight": self.weight_NOI}

    def weight(self, row: int, stored_OI: torch.Tensor) -> torch.Tensor:
        """The trained matrix, [O, I]."""
        return self.weight_NOI[row]

    def add_gradients(
        self, sums: Sequence[torch.Tensor], row: int, output_gradient_nO: torch.Tensor, inputs_nI: torch.Tensor
    ) -> None:
        """G^T X, with G the gradient of the outputs and X the inputs."""
        sums[0][row] += output_gradient_nO.T @ inputs_nI


@dataclass(frozen=True)
class LowRankMatrices:
    """W + B A with W the stored matrix: Hu et al., "LoRA" (arXiv 2106.09685), without its scale.

    Gate and up have adapters of their own, although they lie in one matrix. No gradient of a whole matrix is made.
    """

    a_NPRI: torch.Tensor
    b_NPOR: torch.Tensor  # O / P outputs

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """A and B."""
        return {"a": self.a_NPRI, "b": self.b_NPOR}

    def weight(self, row: int, stored_OI: torch.Tensor) -> torch.Tensor:
        """W + B A, [O, I]."""
        return stored_OI.float() + (self.b_NPOR[row] @ self.a_NPRI[row]).flatten(0, 1)

    def add_gradients(
        self, sums: Sequence[torch.Tensor], row: int, output_gradient_nO: torch.Tensor, inputs_nI: torch.Tensor
    ) -> None:
        """(G B)^T X for A, and G^T (X A^T) for B."""
        a_sums_PRI, b_sums_POR = sums[0][row], sums[1][row]
        a_PRI, b_POR = (tensor[row].to(inputs_nI.dtype) for tensor in (self.a_NPRI, self.b_NPOR))
        for part, gradient_nO in enumerate(output_gradient_nO.chunk(len(a_PRI), dim=-1)):
            a_sums_PRI[part] += (gradient_nO @ b_POR[part]).T @ inputs_nI
            b_sums_POR[part] += gradient_nO.T @ (inputs_nI @ a_PRI[part].T)


@dataclass(frozen=True)
class TrainedExperts:
    """Some experts of one layer, with the tensors that stand in for their weights."""

    experts: tuple[int, ...]
    gate_up: TrainedMatrices
    down: TrainedMatrices

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is trained, by name: those of gate and up, then those of down."""
        return {
            f"{matrix}.{name}": tensor
            for matrix, matrices in (("gate_up", self.gate_up), ("down", self.down))
            for name, tensor in matrices.tensors.items()
        }

    def gate_up_weight(self, expert: int, stored_OI: torch.Tensor) -> torch.Tensor:
        """The expert's gate and up matrix: what stands in for the stored one, or that if the expert is not trained."""
        return self.gate_up.weight(self._row(expert), stored_OI) if expert in self.experts else stored_OI

    def down_weight(self, expert: int, stored_OI: torch.Tensor) -> torch.Tensor:
        """The expert's down matrix, likewise."""
        return self.down.weight(self._row(expert), stored_OI) if expert in self.experts else stored_OI

    def add_gradients(
        self,
        sums: Sequence[torch.Tensor],
        expert: int,
        of_gate_up: tuple[torch.Tensor, torch.Tensor],
        of_down: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Adds to the ``sums``, one for each of the tensors, what a trained expert's tokens give.

        Each product comes as (gradient of its outputs, its inputs).
        """
        n_gate_up, row = len(self.gate_up.tensors), self._row(expert)
        self.gate_up.add_gradients(sums[:n_gate_up], row, *of_gate_up)
        self.down.add_gradients(sums[n_gate_up:], row, *of_down)

    def _row(self, expert: int) -> int:
        return self.experts.index(expert)
