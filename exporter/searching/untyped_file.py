"""The file of a student, apart from the types of its tensors, and the bytes that a choice of types needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compressors.model.description.spec import ModelSpec
from compressors.model.sources.source import Source
from compressors.sensitivity import Unit, UnitPlan
from exporter.estimating.budget import predict
from exporter.estimating.prediction import Prediction
from exporter.planning.recipe import BudgetChoice, FileChoice

__all__ = ["UntypedFile"]

_BASE_MIX: Mapping[str, str] = {"gguf": "Q8_0", "onnx": "Q4_0"}
"""The mix or preset whose types an allocation replaces."""


@dataclass(frozen=True)
class UntypedFile:
    """The file of a student, apart from the types of its tensors."""

    artifact: str  # gguf or onnx
    source: Source  # the original
    name: str  # of the original
    spec: ModelSpec  # the student's
    budget: BudgetChoice
    threads: int
    choice: FileChoice  # quantizer and importance matrix

    def file(self, choices: Mapping[str, str], units: Iterable[Unit | UnitPlan]) -> FileChoice:
        """The recipe's choice for a type of each unit."""
        types = {tensor: choices[unit.name] for unit in units for tensor in unit.tensors}
        return self.choice.model_copy(update={"mix": _BASE_MIX[self.artifact], "tensors": types})

    def prediction(self, choice: FileChoice) -> Prediction:
        """Predicts the needs of a file of these types."""
        return predict(self.artifact, self.source, self.name, self.spec, choice, self.budget, self.threads)

    def counted(self, choice: FileChoice) -> int:
        """Bytes that the budget counts."""
        return self.prediction(choice).counted(self.budget.kind)
