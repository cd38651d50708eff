"""The tensors of a student that are trained: its routers, and with them norms, matrices, or scales of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import Kind, TensorSpec
from compressors.model.errors import InputError
from compressors.model.sources.student import ExpertMap
from compressors.recover.schedule import RATES_HIDDEN_SIZE

if TYPE_CHECKING:
    import torch

    from compressors.calibration.statistics import LayerStatistics

__all__ = ["BlockLength", "Scope", "expert_matrices", "expert_usage", "is_routers", "scaled_matrices"]

BlockLength = Callable[[Role, int], int | None]
"""(role, layer) -> number of values of a row that share scales in the file that a student was written to; None: the
matrix has no scales that can be trained."""

_ROUTER_RATE_BESIDE_SCALES = 0.1


@dataclass(frozen=True)
class Scope:
    """A rung of the ladder.

    Attributes:
        n_experts: the number of experts of each layer that are trained, most used first; None: all.
        adapter_rank: the experts get low-rank adapters of this rank; None: they are trained whole.
        norms: all RMS norms, those of queries and keys and the final one included.
        attention: the whole matrices and biases of attention, or of another mixer, of shared experts and of dense
            feed-forwards.
        scales: a factor for each block of the matrices of mixers and experts, beside codes that stay.
        bases: the bases that replaced experts stand on, and these experts' adapters.
    """

    n_experts: int | None = 0
    adapter_rank: int | None = None
    norms: bool = False
    attention: bool = False
    scales: bool = False
    bases: bool = False

    @classmethod
    def routers(cls) -> Scope:
        """The routers alone."""
        return cls()

    @classmethod
    def most_used(cls, n_experts: int) -> Scope:
        """The routers, and the experts of each layer that most tokens chose."""
        return cls(n_experts)

    @classmethod
    def all_experts(cls) -> Scope:
        """The routers and all experts."""
        return cls(None)

    @classmethod
    def adapters(cls, rank: int) -> Scope:
        """The routers, and an adapter for each matrix of all experts."""
        return cls(None, rank)

    @classmethod
    def replaced_experts(cls) -> Scope:
        """The routers, and the bases and adapters that stand for replaced experts."""
        return cls(bases=True)

    @classmethod
    def routers_and_norms(cls) -> Scope:
        """The routers and all norms."""
        return cls(norms=True)

    @classmethod
    def block_scales(cls) -> Scope:
        """The routers, all norms, and a factor for each block of a written file."""
        return cls(norms=True, scales=True)

    @classmethod
    def everything(cls) -> Scope:
        """All of the decoder layers, and the final norm."""
        return cls(None, norms=True, attention=True)

    @property
    def name(self) -> str:
        """The name in reports, such as ``router``, ``router + 8 experts`` or ``router + adapters of rank 8``."""
        parts = ["router"]
        parts += ["norms"] * self.norms + ["attention"] * self.attention + ["block scales"] * self.scales
        parts += ["bases and adapters"] * self.bases
        if self.adapter_rank is not None:
            parts.append(f"adapters of rank {self.adapter_rank}")
        elif self.n_experts != 0:
            parts.append("all experts" if self.n_experts is None else f"{self.n_experts} experts")
        return " + ".join(parts)

    def name_in(self, student: ModelSpec) -> str:
        """The name for this student: a dense one has feed-forwards, and no routers in its files."""
        if any(tensor.kind is Kind.ROUTER for tensor, _ in student.written.places):
            return self.name
        whole = [("norms", self.norms), ("attention", self.attention), ("block scales", self.scales)]
        parts = [part for part, is_trained in whole if is_trained]
        if self.adapter_rank is not None:
            parts.append(f"adapters of rank {self.adapter_rank}")
        elif self.n_experts != 0 or not parts:
            parts.append("feed-forwards")
        return " + ".join(parts)

    def check_against(self, spec: ModelSpec) -> None:
        """Checks that this scope fits a model.

        Raises:
            InputError: no layer of the model has so many experts or such a rank.
        """
        if self.n_experts is not None and not 0 <= self.n_experts <= spec.n_experts:
            raise InputError(f"{self.n_experts} experts of each layer cannot be trained: there are {spec.n_experts}")
        most = min(spec.expert_size, spec.expert_width)
        if self.adapter_rank is not None and not 1 <= self.adapter_rank <= most:
            raise InputError(f"adapters cannot have rank {self.adapter_rank}: it must be from 1 to {most}")
        if self.n_experts != 0 and any(layer.bases is not None for layer in spec.layers):
            raise InputError(
                "experts cannot be trained whole, or by further adapters, where some stand on shared bases: they would "
                "no longer share these; train bases and adapters instead (scope replaced)"
            )
        if self.bases and all(layer.bases is None for layer in spec.layers):
            raise InputError(
                "bases and adapters are trained where experts were replaced, and no expert of this model was"
            )

    def experts(self, usage_E: torch.Tensor) -> tuple[int, ...]:
        """The indices of the experts of a layer that are trained, in ascending order.

        Args:
            usage_E: number of tokens that chose each expert; among equals the lower index comes first.
        """
        if self.n_experts is None:
            return tuple(range(len(usage_E)))
        import torch

        most_used_first = torch.argsort(usage_E, descending=True, stable=True)
        return tuple(sorted(most_used_first[: self.n_experts].tolist()))

    def router_rate(self, hidden_size: int) -> float:
        """The routers' learning rate as a multiple of the scope's.

        Beside norms and scales, whose rate is a relative change, routers take a tenth of it; an Adam step moves their
        logits in proportion to the hidden size.
        """
        only_relative = self.norms and self.n_experts == 0
        return _ROUTER_RATE_BESIDE_SCALES * RATES_HIDDEN_SIZE / hidden_size if only_relative else 1.0

    def trains(self, tensor: TensorSpec) -> bool:
        """True if a tensor outside of experts is trained whole. A selection bias never is: no gradient reaches it."""
        if is_routers(tensor):
            return True
        if tensor.kind is Kind.NORM:
            return self.norms
        return self.attention and tensor.kind not in (Kind.SELECTION, Kind.TABLE)

    def parameters(self, layer: LayerSpec, block_length: Callable[[Role], int | None] | None = None) -> int:
        """The number of trained parameters of a layer.

        Args:
            layer: the layer's description.
            block_length: block length of each role's matrices; needed where their scales are trained.
        """
        n_experts = layer.n_experts if self.n_experts is None else min(self.n_experts, layer.n_experts)
        n_trained = n_experts * sum(self._of_expert(layer.dimensions(tensor)) for tensor in expert_matrices(layer))
        n_trained += sum(layer.n_values(tensor) for tensor in layer.shared_tensors if self.trains(tensor))
        if self.bases and layer.bases is not None:
            of_replaced = [layer.bases.n_values(*layer.dimensions(tensor)) for tensor in expert_matrices(layer)]
            n_trained += sum(of_replaced)
        return n_trained + (self._factors(layer, block_length) if self.scales and block_length is not None else 0)

    def _of_expert(self, shape: tuple[int, ...]) -> int:
        """Trained parameters of one matrix of an expert."""
        return math.prod(shape) if self.adapter_rank is None else self.adapter_rank * sum(shape)

    def _factors(self, layer: LayerSpec, block_length: Callable[[Role], int | None]) -> int:
        """Factors of a layer's blocks."""
        lengths = {tensor: block_length(tensor.role) for tensor in scaled_matrices(layer)}
        return sum(layer.n_values(tensor) // length for tensor, length in lengths.items() if length is not None)


def is_routers(tensor: TensorSpec) -> bool:
    """True if a tensor is part of the function that gives the routed experts' logits and weights."""
    return tensor.kind is Kind.ROUTER and tensor.experts_axis is not None


def expert_matrices(layer: LayerSpec) -> tuple[TensorSpec, ...]:
    """The matrices that every routed expert of a layer has."""
    return tuple(tensor for tensor in layer.expert_tensors if tensor.kind is Kind.MATRIX)


def scaled_matrices(layer: LayerSpec) -> tuple[TensorSpec, ...]:
    """The matrices of a layer whose scales are trained: those of its mixer, and of experts where it has some."""
    return tuple(
        tensor
        for tensor in layer.tensors
        if tensor.kind is Kind.MATRIX and (tensor.is_per_expert or not tensor.role.is_feed_forward)
    )


def expert_usage(statistics: Sequence[LayerStatistics], experts: ExpertMap) -> list[torch.Tensor]:
    """The number of calibration tokens that chose each expert of a student: float64 [E], by layer.

    Args:
        statistics: the statistics of each layer of the model that was watched: the teacher, or the student itself.
        experts: the student in terms of that model; an expert that stands for several gets their sum.
    """
    import torch

    return [
        torch.stack([statistics[layer.source].count_E[list(group)].sum() for group in layer.groups])
        if layer.groups
        else torch.zeros(0, dtype=torch.float64)
        for layer in experts.layers
    ]
