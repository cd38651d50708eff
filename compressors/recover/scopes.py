"""Which of a student's tensors are trained: always its routers, and with them experts or adapters of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compressors.model.errors import InputError
from compressors.model.shape import MoeShape
from compressors.model.student import ExpertMap
from compressors.statistics import LayerStatistics

__all__ = ["Scope", "expert_usage"]


@dataclass(frozen=True)
class Scope:
    """A rung of the ladder.

    Attributes:
        n_experts: that many experts of each layer, those that most tokens chose; None: all.
        adapter_rank: the experts get low-rank adapters of this rank; None: they are trained whole.
    """

    n_experts: int | None = 0
    adapter_rank: int | None = None

    @classmethod
    def routers(cls) -> Scope:
        """Nothing but the routers."""
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

    @property
    def name(self) -> str:
        """For reports: ``router``, or ``router + 8 experts``, ``... + all experts``, ``... + adapters of rank 8``."""
        if self.n_experts == 0:
            return "router"
        if self.adapter_rank is not None:
            return f"router + adapters of rank {self.adapter_rank}"
        return "router + all experts" if self.n_experts is None else f"router + {self.n_experts} experts"

    def name_in(self, student: MoeShape) -> str:
        """The same for a student of this shape: a dense one has feed-forwards, and routers that decide nothing."""
        if not student.is_dense:
            return self.name
        return "feed-forwards" if self.adapter_rank is None else f"adapters of rank {self.adapter_rank}"

    def check_against(self, shape: MoeShape) -> None:
        """Checks that a model of this shape can be trained so.

        Raises:
            InputError: a number of experts, or a rank, that no layer of the model has.
        """
        if self.n_experts is not None and not 0 <= self.n_experts <= shape.n_experts:
            raise InputError(f"{self.n_experts} experts of each layer cannot be trained: there are {shape.n_experts}")
        most = min(shape.hidden_size, shape.expert_width)
        if self.adapter_rank is not None and not 1 <= self.adapter_rank <= most:
            raise InputError(f"adapters cannot have rank {self.adapter_rank}: it must be from 1 to {most}")

    def experts(self, usage_E: torch.Tensor) -> tuple[int, ...]:
        """Which experts of a layer are trained, in order.

        Args:
            usage_E: how many tokens chose each of them; of equals the lower index comes first.
        """
        if self.n_experts is None:
            return tuple(range(len(usage_E)))
        most_used_first = torch.argsort(usage_E, descending=True, stable=True)
        return tuple(sorted(most_used_first[: self.n_experts].tolist()))

    def parameters(self, layer: MoeShape) -> int:
        """Trained parameters of a layer of this shape."""
        if not layer.has_moe:
            return 0
        n_experts = layer.n_experts if self.n_experts is None else min(self.n_experts, layer.n_experts)
        if self.adapter_rank is None:
            of_one = layer.expert_parameters
        else:
            of_one = 3 * self.adapter_rank * (layer.hidden_size + layer.expert_width)
        return layer.n_experts * layer.hidden_size + n_experts * of_one


def expert_usage(statistics: Sequence[LayerStatistics], experts: ExpertMap) -> list[torch.Tensor]:
    """How many calibration tokens chose each expert of a student: float64 [E], by layer.

    Args:
        statistics: by layer of the model that was watched: the teacher, or the student itself.
        experts: the student in terms of that model. An expert that stands for several has their sum.
    """
    return [
        torch.stack([statistics[layer.source].count_E[list(group)].sum() for group in layer.groups])
        if layer.groups
        else torch.zeros(0, dtype=torch.float64)
        for layer in experts.layers
    ]
