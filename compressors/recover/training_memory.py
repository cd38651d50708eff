"""What training takes in memory, by arithmetic, so that a scope that does not fit is refused before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from compressors.model.errors import InputError
from compressors.model.layers import layer_bytes
from compressors.model.memory import PROCESS_BYTES, MemoryLimit, working_bytes
from compressors.model.shape import MoeShape
from compressors.model.student import Student
from compressors.recover.scopes import Scope

__all__ = ["TrainingBytes", "refuse_too_large", "training_bytes"]

_FLOAT32 = 4


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of what is trained, all of it float32."""

    weights: int  # master copies
    gradients: int  # of a step
    moments: int  # Adam's two
    passing: int  # one layer's gradients once more, while they are made

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.later

    @property
    def later(self) -> int:
        """What the first step adds to the weights."""
        return self.gradients + self.moments + self.passing


def training_bytes(scope: Scope, shape: MoeShape) -> TrainingBytes:
    """What a student of this shape takes when these of its tensors are trained."""
    parameters = [scope.parameters(shape.layer(layer)) for layer in range(shape.n_layers)]
    all_bytes = _FLOAT32 * sum(parameters)
    return TrainingBytes(all_bytes, all_bytes, 2 * all_bytes, _FLOAT32 * max(parameters))


def refuse_too_large(scope: Scope, student: Student, limit: MemoryLimit) -> None:
    """Refuses a scope that cannot be trained within the limit with a single layer in memory.

    Raises:
        InputError: the message says how much would be needed.
    """
    trained = training_bytes(scope, student.shape).total
    needed = PROCESS_BYTES + layer_bytes(student) + working_bytes(student.shape) + trained
    if needed > limit.n_bytes:
        raise InputError(
            f"training {scope.name} needs {needed / 1e9:.2f} GB of memory, {trained / 1e9:.2f} GB of it for float32 "
            f"weights, gradients and Adam's moments, but the limit is {limit.n_bytes / 1e9:.2f} GB: "
            "train adapters, of a smaller rank, or raise --memory"
        )
