"""The table that an allocation chooses from: the cost of each unit's types in bytes, time and divergence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from compressors.model.description.roles import Role
from compressors.sensitivity.divergence import SecondOrder
from compressors.sensitivity.quantizers import Quantizer

__all__ = ["Candidate", "Option", "TypeTable", "Unit", "UnitPlan"]


@dataclass(frozen=True)
class Option:
    """One type that a unit may have."""

    choice: str  # the type's name
    n_bytes: int  # in the file, alignment included; of ONNX under a budget of memory, at run time
    order: SecondOrder  # predicted
    seconds: float = 0.0  # its part of the time to decode a token


@dataclass(frozen=True)
class Unit:
    """Tensors that have one type in common, mostly a single one."""

    name: str
    tensors: tuple[str, ...]
    options: tuple[Option, ...]

    def option(self, choice: str) -> Option:
        """The option of this name; a KeyError if there is none."""
        for option in self.options:
            if option.choice == choice:
                return option
        raise KeyError(f"{self.name} cannot be {choice}")


@dataclass(frozen=True)
class TypeTable:
    """All units of a file."""

    units: tuple[Unit, ...]

    def without(self, choices: Collection[str]) -> TypeTable:
        """The table without these types."""
        return TypeTable(
            tuple(
                replace(unit, options=tuple(option for option in unit.options if option.choice not in choices))
                for unit in self.units
            )
        )

    def n_bytes(self, choices: Mapping[str, str]) -> int:
        """Bytes of a choice of every unit."""
        return sum(unit.option(choices[unit.name]).n_bytes for unit in self.units)

    def order(self, choices: Mapping[str, str]) -> SecondOrder:
        """The predicted second-order divergence of a choice of every unit."""
        return sum((unit.option(choices[unit.name]).order for unit in self.units), SecondOrder(0.0, 0.0))

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data for a JSON file."""
        return [asdict(unit) for unit in self.units]

    @classmethod
    def from_json(cls, data: Sequence[Mapping[str, Any]]) -> TypeTable:
        """The inverse of :meth:`to_json`."""
        return cls(
            tuple(
                Unit(
                    unit["name"], tuple(unit["tensors"]), tuple(_option_from_json(option) for option in unit["options"])
                )
                for unit in data
            )
        )


@dataclass(frozen=True)
class Candidate:
    """A type that a unit may have, before its error is measured."""

    choice: str
    n_bytes: int
    quantize: Quantizer | None  # None: exact
    factor: Callable[[Role], float] = lambda _role: 1.0  # the part of the quantizer's error that is left
    seconds: float = 0.0


@dataclass(frozen=True)
class UnitPlan:
    """A unit, before the errors of its types are measured."""

    name: str
    tensors: tuple[str, ...]
    matrices: tuple[tuple[Role, int | None], ...]
    candidates: tuple[Candidate, ...]

    def without(self, choices: Collection[str]) -> UnitPlan:
        """The unit without these types."""
        return replace(self, candidates=tuple(entry for entry in self.candidates if entry.choice not in choices))


def _option_from_json(data: Mapping[str, Any]) -> Option:
    return Option(**{**data, "order": SecondOrder(**data["order"])})
