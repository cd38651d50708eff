"""The table that an allocation chooses from: the cost of each unit's types in bytes, time and divergence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from compressors.calibration.statistics import Importance
from compressors.model.description.roles import Role
from compressors.model.sources.student import Student
from compressors.model.threads import one_thread_each
from compressors.sensitivity.divergence import SecondOrder
from compressors.sensitivity.matrices import Sensitivities
from compressors.sensitivity.sampling import SAMPLED_WEIGHTS, Quantizer, RowSample, sample_rows

__all__ = ["Candidate", "Option", "TypeTable", "Unit", "UnitPlan", "measured_table"]


@dataclass(frozen=True)
class Option:
    """One type that a unit may have."""

    choice: str  # the type's name
    n_bytes: int  # in the file, alignment included
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


def measured_table(
    student: Student,
    plans: Sequence[UnitPlan],
    sensitivities: Sensitivities,
    importance: Importance,
    *,
    n_weights: int | None = SAMPLED_WEIGHTS,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> TypeTable:
    """Measures the error of every candidate type of every unit by quantizing rows of its tensors.

    Args:
        student: the model that is written.
        plans: the units, in the order of the file.
        sensitivities: the sensitivities of the student's matrices.
        importance: the importance matrix that the file is written with.
        n_weights: weights of a tensor that are quantized (:func:`~compressors.sensitivity.sampling.sample_rows`);
            None: all.
        threads: the number of types that are tried at a time; the table does not depend on it.
        progress: called with 1 for each finished unit.

    Raises:
        InputError: a weight cannot be read or is not finite.
    """
    units = []
    with one_thread_each(threads) as pool:
        for plan in plans:
            samples = [
                (role, sample_rows(student, role, layer, sensitivities.of(role, layer), importance, n_weights))
                for role, layer in plan.matrices
            ]
            options = list(pool.map(lambda candidate, samples=samples: _option(candidate, samples), plan.candidates))
            units.append(Unit(plan.name, plan.tensors, tuple(options)))
            if progress is not None:
                progress(1)
    return TypeTable(tuple(units))


def _option(candidate: Candidate, samples: Sequence[tuple[Role, RowSample]]) -> Option:
    order = SecondOrder(0.0, 0.0)
    if candidate.quantize is not None:
        for role, sample in samples:
            order += sample.second_order(candidate.quantize) * candidate.factor(role)
    return Option(candidate.choice, candidate.n_bytes, order, candidate.seconds)


def _option_from_json(data: Mapping[str, Any]) -> Option:
    return Option(**{**data, "order": SecondOrder(**data["order"])})
