"""Experts whose matrices are a base that they share with others, plus a low-rank part of their own.

LightMoE's replaced experts have this form (Hao et al., arXiv 2603.12645), and so have D2-MoE's, all on one base, and
those cut by activation-weighted SVD, on none. An overlay holds each base once, under the name of an expert's matrix
with ``bases.G`` in place of the expert's number, and the low-rank parts as the adapters of
:mod:`compressors.model.sources.adapters`. A student reads such an expert as W + B A, like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["SharedBases"]


@dataclass(frozen=True)
class SharedBases:
    """The experts of a student's layer that stand on shared bases.

    Attributes:
        base_of: [student expert]: the index of its base in the layer; ``ZERO``: its adapter alone is its matrix; None:
            it has matrices of its own.
        n_bases: the number of the layer's bases.
        rank: the rank of each adapter.
    """

    base_of: tuple[int | None, ...]
    n_bases: int
    rank: int

    ZERO: ClassVar[int] = -1

    @property
    def own(self) -> tuple[int, ...]:
        """The experts that have matrices of their own, ascending."""
        return tuple(expert for expert, base in enumerate(self.base_of) if base is None)

    @property
    def replaced(self) -> tuple[int, ...]:
        """The experts that have no matrices of their own, ascending."""
        return tuple(expert for expert, base in enumerate(self.base_of) if base is not None)

    def members(self, base: int) -> tuple[int, ...]:
        """The experts that stand on a base, ascending."""
        return tuple(expert for expert, own in enumerate(self.base_of) if own == base)

    def n_values(self, rows: int, columns: int) -> int:
        """The values that stand for the replaced experts' matrices of this shape: bases, and A and B of each."""
        return self.n_bases * rows * columns + len(self.replaced) * self.rank * (rows + columns)

    def check_against(self, n_experts: int) -> None:
        """Checks that this describes the experts of a layer.

        Raises:
            ValueError: the number of experts is another, a base has no expert or does not exist, or the rank is not
                positive.
        """
        used = {base for base in self.base_of if base is not None and base != self.ZERO}
        if len(self.base_of) != n_experts or used != set(range(self.n_bases)) or self.rank < 1 or not self.replaced:
            raise ValueError(
                f"{self.n_bases} bases with adapters of rank {self.rank} stand under the experts {list(self.base_of)}, "
                f"of which there are {n_experts}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON or YAML file."""
        return {"base_of": list(self.base_of), "bases": self.n_bases, "rank": self.rank}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SharedBases:
        """The inverse of :meth:`to_json`."""
        return cls(tuple(data["base_of"]), int(data["bases"]), int(data["rank"]))
