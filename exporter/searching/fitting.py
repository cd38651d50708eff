"""Fits a file into a budget: the best types by a table of predicted divergences, and no byte too many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressors.model.errors import InputError
from compressors.sensitivity import Allocation, TypeTable, UnitPlan, allocate_file
from exporter.estimating.prediction import Prediction
from exporter.planning.recipe import FileChoice
from exporter.searching.untyped_file import UntypedFile

__all__ = ["Fitted", "fit", "smallest"]

_CHEAPEST_SECOND, _DEAREST_SECOND = 1e-4, 1e6  # nats that a second of decoding may be worth
_PRICE_STEPS = 8  # steps of the bisection: the price is then known to a twentieth of its logarithm


@dataclass(frozen=True)
class Fitted:
    """The best types that fit."""

    choice: FileChoice
    allocation: Allocation
    prediction: Prediction


def fit(untyped: UntypedFile, table: TypeTable, *, seconds: float | None = None) -> Fitted | None:
    """The best allocation whose file keeps the budget; None if the smallest does not.

    Args:
        untyped: the artifact.
        table: the table of its units.
        seconds: the most time to decode a token, if an allocation that fits can be that fast; None: any.
    """
    best = _fitted(untyped, table, 0.0)
    if best is None or seconds is None or best.allocation.seconds <= seconds:
        return best
    low, high = _CHEAPEST_SECOND, _DEAREST_SECOND
    fast = _fitted(untyped, table, high)
    for _ in range(_PRICE_STEPS):
        price = math.sqrt(low * high)
        found = _fitted(untyped, table, price)
        if found is not None and found.allocation.seconds <= seconds:
            fast, high = found, price
        else:
            low = price
    return fast


def _fitted(untyped: UntypedFile, table: TypeTable, nats_per_second: float) -> Fitted | None:
    files: dict[tuple[str, ...], tuple[FileChoice, Prediction]] = {}

    def counted(choices: Mapping[str, str]) -> int:
        choice = untyped.file(choices, table.units)
        prediction = untyped.prediction(choice)
        files[tuple(choices.values())] = choice, prediction
        return prediction.counted(untyped.budget.kind)

    try:
        allocation = allocate_file(table, untyped.budget.bytes, counted, nats_per_second=nats_per_second)
    except InputError:
        return None
    choice, prediction = files[tuple(allocation.choices.values())]
    return Fitted(choice, allocation, prediction)


def smallest(untyped: UntypedFile, units: Sequence[UnitPlan]) -> int:
    """The bytes that the budget counts for the file of the smallest types."""
    choices = {unit.name: min(unit.candidates, key=lambda candidate: candidate.n_bytes).choice for unit in units}
    return untyped.counted(untyped.file(choices, units))
