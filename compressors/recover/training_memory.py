"""What training takes in memory, by arithmetic, so that a scope that does not fit is refused before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from compressors.model.errors import InputError
from compressors.model.memory import PROCESS_BYTES, least_bytes
from compressors.model.shape import MoeShape
from compressors.recover.scopes import Scope

__all__ = ["TooLargeError", "TrainingBytes", "refuse_too_large", "training_bytes"]

_FLOAT32 = 4


class TooLargeError(InputError):
    """What is to be trained does not fit the memory."""


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


def refuse_too_large(scope: Scope, shape: MoeShape, itemsize: int, limit_bytes: int) -> None:
    """Refuses a scope that cannot be trained within the limit with a single layer in memory.

    Args:
        scope: what is trained.
        shape: the student's.
        itemsize: bytes of a stored weight.
        limit_bytes: what the process may use.

    Raises:
        TooLargeError: the message says how much would be needed.
    """
    trained = training_bytes(scope, shape).total
    needed = PROCESS_BYTES + least_bytes(shape, shape.layer_parameters * itemsize) + trained
    if needed > limit_bytes:
        raise TooLargeError(
            f"training {scope.name_in(shape)} needs {needed / 1e9:.2f} GB of memory, {trained / 1e9:.2f} GB of it for "
            f"float32 weights, gradients and Adam's moments, but the limit is {limit_bytes / 1e9:.2f} GB: "
            "train adapters, of a smaller rank, or raise --memory"
        )
