"""Fits a file into a budget: the best types by a table of predicted divergences, and no byte too many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compressors.model.errors import InputError
from compressors.sensitivity import Allocation, TypeTable, allocate, allocate_file, smallest_bytes
from exporter.planning.container import Container
from exporter.prediction import Prediction
from exporter.recipe import FileChoice

__all__ = ["Fitted", "fit", "smallest"]


@dataclass(frozen=True)
class Fitted:
    """The best types that fit."""

    choice: FileChoice
    allocation: Allocation
    prediction: Prediction


def fit(container: Container, table: TypeTable, *, nats_per_second: float = 0.0) -> Fitted | None:
    """The best allocation whose file keeps the budget; None if the smallest does not."""

    def counted(choices: Mapping[str, str]) -> int:
        return container.counted(container.file(choices, table))

    try:
        allocation = allocate_file(table, container.budget.bytes, counted, nats_per_second=nats_per_second)
    except InputError:
        return None
    choice = container.file(allocation.choices, table)
    return Fitted(choice, allocation, container.prediction(choice))


def smallest(container: Container, table: TypeTable) -> int:
    """Bytes that the budget counts of the smallest file."""
    allocation = allocate(table, smallest_bytes(table))
    return container.counted(container.file(allocation.choices, table))
