"""Float32 tensors that stand in for experts' weights while they are trained.

An expert has two matrices as transformers fuses them: gate and up [2F, D], or up alone, and down [D, F]. Each is
trained whole, through a low-rank adapter on top of the stored matrix or of a base that experts share, or through a
factor for each of its blocks.

Letters: N trained experts of a layer, O outputs and I inputs of a matrix, n tokens of one expert, R rank,
P parts of a fused matrix (2: gate and up; 1: down, or up alone), K blocks of a row, M bases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

__all__ = ["BasedMatrices", "Fade", "LowRankMatrices", "Product", "ScaledMatrices", "TrainedExperts", "TrainedMatrices"]
__all__ += ["WholeMatrices", "scaled"]


def scaled(stored_RI: torch.Tensor, factors_RK: torch.Tensor) -> torch.Tensor:
    """The matrix with each block of a row, I / K values, times its factor: float32 [R, I]."""
    blocks_RKB = stored_RI.float().unflatten(-1, (factors_RK.shape[-1], -1))
    scaled_RI: torch.Tensor = (blocks_RKB * factors_RK[..., None]).flatten(-2)
    return scaled_RI


@dataclass(frozen=True)
class Product:
    """The tensors of ``inputs @ weight.T``, a matrix's product with one expert's tokens, for backward."""

    output_gradient_nO: torch.Tensor
    inputs_nI: torch.Tensor
    stored_OI: torch.Tensor  # the matrix that the trained one stands in for

    @property
    def gradient(self) -> torch.Tensor:
        """The gradient of the matrix, G^T X: [O, I]."""
        return self.output_gradient_nO.T @ self.inputs_nI


class TrainedMatrices(Protocol):
    """One of the two matrices of N experts of a layer."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The trained tensors by name: float32, with the experts, or the bases, on the first axis."""

    def weight(self, row: int, stored_OI: torch.Tensor) -> torch.Tensor:
        """The matrix that stands in for the ``row``-th trained expert's stored one: float32 [O, I]."""

    def add_gradients(self, sums: Sequence[torch.Tensor], row: int, product: Product) -> None:
        """Adds the gradients that a product gives; ``sums`` are in the order of the tensors."""


@dataclass(frozen=True)
class WholeMatrices:
    """Matrices that are trained whole."""

    weight_NOI: torch.Tensor

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The one tensor."""
        return {"weight": self.weight_NOI}

    def weight(self, row: int, stored_OI: torch.Tensor) -> torch.Tensor:
        """The trained matrix, [O, I]."""
        return self.weight_NOI[row]

    def add_gradients(self, sums: Sequence[torch.Tensor], row: int, product: Product) -> None:
        """Adds G^T X, with G the gradient of the outputs and X the inputs."""
        sums[0][row] += product.gradient


@dataclass(frozen=True)
class LowRankMatrices:
    """W + B A, where W is the stored matrix: Hu et al., "LoRA" (arXiv 2106.09685), without its scale.

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

    def add_gradients(self, sums: Sequence[torch.Tensor], row: int, product: Product) -> None:
        """Adds (G B)^T X for A, and G^T (X A^T) for B."""
        output_gradient_nO, inputs_nI = product.output_gradient_nO, product.inputs_nI
        a_sums_PRI, b_sums_POR = sums[0][row], sums[1][row]
        a_PRI, b_POR = (tensor[row].to(inputs_nI.dtype) for tensor in (self.a_NPRI, self.b_NPOR))
        for part, gradient_nO in enumerate(output_gradient_nO.chunk(len(a_PRI), dim=-1)):
            a_sums_PRI[part] += (gradient_nO @ b_POR[part]).T @ inputs_nI
            b_sums_POR[part] += gradient_nO.T @ (inputs_nI @ a_PRI[part].T)


@dataclass(frozen=True)
class BasedMatrices:
    """A base that some experts share, plus B A of each: what is stored takes no part."""

    base_MOI: torch.Tensor  # gate and up in one, like what is stored
    base_of: tuple[int, ...]  # of each trained expert; below 0: B A alone is its matrix
    own: LowRankMatrices

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The bases, A and B."""
        return {"base": self.base_MOI, **self.own.tensors}

    def weight(self, row: int, stored_OI: torch.Tensor) -> torch.Tensor:
        """The expert's base plus B A, [O, I]."""
        base = self.base_of[row]
        return self.own.weight(row, torch.zeros_like(stored_OI) if base < 0 else self.base_MOI[base])

    def add_gradients(self, sums: Sequence[torch.Tensor], row: int, product: Product) -> None:
        """Adds G^T X to the base's, and what an adapter gets to A's and B's."""
        if self.base_of[row] >= 0:
            sums[0][self.base_of[row]] += product.gradient
        self.own.add_gradients(sums[1:], row, product)


@dataclass(frozen=True)
class ScaledMatrices:
    """Stored matrices whose blocks are each multiplied by a factor, as if they had other scales.

    Gate and up may have blocks of different lengths. A part without factors stays as it is stored.
    """

    factors: tuple[torch.Tensor | None, ...]  # for each part [N, O / P, K]

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The factors of each part that has them."""
        return {f"factors.{part}": tensor for part, tensor in enumerate(self.factors) if tensor is not None}

    def weight(self, row: int, stored_OI: torch.Tensor) -> torch.Tensor:
        """The matrix with its blocks multiplied, [O, I]."""
        parts = stored_OI.chunk(len(self.factors))
        return torch.cat(
            [
                part_OI.float() if factors is None else scaled(part_OI, factors[row])
                for part_OI, factors in zip(parts, self.factors, strict=True)
            ]
        )

    def add_gradients(self, sums: Sequence[torch.Tensor], row: int, product: Product) -> None:
        """Adds the sum of the element-wise product (G^T X) W over each block to the gradient of its factor."""
        products_OI = (product.gradient * product.stored_OI).chunk(len(self.factors))
        trained = [part_OI for part_OI, factors in zip(products_OI, self.factors, strict=True) if factors is not None]
        for part_OI, sums_NOK in zip(trained, sums, strict=True):
            sums_NOK[row] += part_OI.unflatten(-1, (sums_NOK.shape[-1], -1)).sum(-1)


@dataclass
class Fade:
    """The share of trained experts in what they put out together with the stored ones, which fade out.

    At 0 the stored experts answer alone, at 1 the trained ones. It changes between steps.
    """

    share: float = 1.0


@dataclass(frozen=True)
class TrainedExperts:
    """Some experts of one layer, with the tensors that stand in for their weights."""

    experts: tuple[int, ...]
    gate_up: TrainedMatrices
    down: TrainedMatrices
    fade: Fade = field(default_factory=Fade)

    def share(self, expert: int) -> float:
        """The share of the trained tensors in the expert's output; the stored matrices have the rest."""
        return self.fade.share if expert in self.experts else 1.0

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name: those of gate and up, then those of down."""
        return {
            f"{matrix}.{name}": tensor
            for matrix, matrices in (("gate_up", self.gate_up), ("down", self.down))
            for name, tensor in matrices.tensors.items()
        }

    def gate_up_weight(self, expert: int, stored_OI: torch.Tensor) -> torch.Tensor:
        """The expert's gate and up matrix: the trained one, or the stored one if the expert is not trained."""
        return self.gate_up.weight(self._row(expert), stored_OI) if expert in self.experts else stored_OI

    def down_weight(self, expert: int, stored_OI: torch.Tensor) -> torch.Tensor:
        """The expert's down matrix: the trained one, or the stored one if the expert is not trained."""
        return self.down.weight(self._row(expert), stored_OI) if expert in self.experts else stored_OI

    def add_gradients(self, sums: Sequence[torch.Tensor], expert: int, of_gate_up: Product, of_down: Product) -> None:
        """Adds the gradients from a trained expert's tokens to the ``sums``, one for each of the tensors."""
        n_gate_up, row = len(self.gate_up.tensors), self._row(expert)
        self.gate_up.add_gradients(sums[:n_gate_up], row, of_gate_up)
        self.down.add_gradients(sums[n_gate_up:], row, of_down)

    def _row(self, expert: int) -> int:
        return self.experts.index(expert)
