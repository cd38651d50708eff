"""Fits a file into a budget: the best types by a table of predicted divergences, and no byte too many."""

from __future__ import annotations

from dataclasses import dataclass

from compressors.model.errors import InputError
from compressors.sensitivity import Allocation, TypeTable, allocate, smallest_bytes
from exporter.planning.container import Container
from exporter.prediction import Prediction
from exporter.recipe import FileChoice

__all__ = ["Fitted", "fit", "smallest"]

_MOST_ROUNDS = 8


@dataclass(frozen=True)
class Fitted:
    """The best types that fit."""

    choice: FileChoice
    allocation: Allocation
    prediction: Prediction


def fit(container: Container, table: TypeTable, *, nats_per_second: float = 0.0) -> Fitted | None:
    """The best allocation whose file keeps the budget; None if the smallest does not.

    What a budget counts beside the tensors (metadata, caches, buffers) hardly depends on their types: the limit of the
    tensors is lowered by what a file has too much, until it has nothing too much.
    """
    limit = container.budget.bytes - (smallest(container, table) - smallest_bytes(table))
    for _ in range(_MOST_ROUNDS):
        try:
            allocation = allocate(table, limit, nats_per_second=nats_per_second)
        except InputError:
            return None
        choice = container.file(allocation, table)
        prediction = container.prediction(choice)
        excess = prediction.counted(container.budget.kind) - container.budget.bytes
        if excess <= 0:
            return Fitted(choice, allocation, prediction)
        limit = allocation.n_bytes - excess
    return None


def smallest(container: Container, table: TypeTable) -> int:
    """Bytes that the budget counts of the smallest file."""
    allocation = allocate(table, smallest_bytes(table))
    return container.counted(container.file(allocation, table))
