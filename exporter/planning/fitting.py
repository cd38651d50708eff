"""Fits a file into a budget: the best types by a table of predicted divergences, and no byte too many."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compressors.model.errors import InputError
from compressors.model.shape import MoeShape
from compressors.sensitivity import Allocation, TypeTable, allocate, smallest_bytes
from exporter.budget import predict
from exporter.planning.units import BASE_MIX
from exporter.prediction import Prediction
from exporter.recipe import BudgetChoice, FileChoice

__all__ = ["Container", "Fitted", "fit", "smallest"]

_MOST_ROUNDS = 8


@dataclass(frozen=True)
class Container:
    """An artifact of a student, apart from the types of its tensors."""

    artifact: str  # gguf or onnx
    folder: Path  # the source checkpoint
    name: str  # of the source
    shape: MoeShape  # the student's
    budget: BudgetChoice
    threads: int
    choice: FileChoice  # quantizer and importance matrix

    def file(self, allocation: Allocation, table: TypeTable) -> FileChoice:
        """The recipe's choice for an allocation."""
        types = {tensor: allocation.choices[unit.name] for unit in table.units for tensor in unit.tensors}
        return self.choice.model_copy(update={"mix": BASE_MIX[self.artifact], "tensors": types})

    def prediction(self, choice: FileChoice) -> Prediction:
        """What a file of these types needs."""
        return predict(self.artifact, self.folder, self.name, self.shape, choice, self.budget, self.threads)

    def counted(self, choice: FileChoice) -> int:
        """Bytes that the budget counts."""
        return self.prediction(choice).counted(self.budget.kind)


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
