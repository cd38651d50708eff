"""Fills the table of an allocation: the error of each type of each unit, measured on rows of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compressors.calibration.statistics import Importance
from compressors.model.description.roles import Role
from compressors.model.sources.student import Student
from compressors.model.threads import one_thread_each
from compressors.sensitivity.divergence import SecondOrder
from compressors.sensitivity.matrices import Sensitivities
from compressors.sensitivity.sampling import SAMPLED_WEIGHTS, RowSample, sample_rows
from compressors.sensitivity.table import Candidate, Option, TypeTable, Unit, UnitPlan

__all__ = ["measured_table"]


def measured_table(
    student: Student,
    plans: Sequence[UnitPlan],
    sensitivities: Sensitivities,
    importance: Importance,
    *,
    n_weights: int | None = SAMPLED_WEIGHTS,
    threads: int = 1,
    known: TypeTable | None = None,
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
        known: a table of the same units whose types are not measured again.
        progress: called with 1 for each finished unit.

    Raises:
        InputError: a weight cannot be read or is not finite.
    """
    units = []
    known_units = {} if known is None else {unit.name: unit for unit in known.units}
    with one_thread_each(threads) as pool:
        for plan in plans:
            there = known_units[plan.name].options if plan.name in known_units else ()
            options = {option.choice: option for option in there}
            missing = [candidate for candidate in plan.candidates if candidate.choice not in options]
            samples = [
                (role, sample_rows(student, role, layer, sensitivities.of(role, layer), importance, n_weights))
                for role, layer in (plan.matrices if missing else ())
            ]
            measured = pool.map(lambda candidate, samples=samples: _option(candidate, samples), missing)
            options |= {option.choice: option for option in measured}
            in_order = tuple(options[candidate.choice] for candidate in plan.candidates)
            units.append(Unit(plan.name, plan.tensors, in_order))
            if progress is not None:
                progress(1)
    return TypeTable(tuple(units))


def _option(candidate: Candidate, samples: Sequence[tuple[Role, RowSample]]) -> Option:
    order = SecondOrder(0.0, 0.0)
    if candidate.quantize is not None:
        for role, sample in samples:
            order += sample.second_order(candidate.quantize) * candidate.factor(role)
    return Option(candidate.choice, candidate.n_bytes, order, candidate.seconds)
