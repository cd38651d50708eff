"""Predicts the memory that training takes, so that a scope that does not fit is refused before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.running.memory import PROCESS_BYTES, least_bytes
from compressors.recover.scopes import BlockLength, Scope

__all__ = ["TooLargeError", "TrainingBytes", "refuse_too_large", "training_bytes"]

_FLOAT32 = 4


class TooLargeError(InputError):
    """The tensors to be trained do not fit the memory."""


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of the trained tensors, their gradients and Adam's moments, all float32."""

    weights: int  # master copies
    gradients: int  # gradients of a step
    moments: int  # Adam's two moments
    passing: int  # one layer's gradients once more, while they are made

    @property
    def values(self) -> int:
        """The number of trained values."""
        return self.weights // _FLOAT32

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.later

    @property
    def later(self) -> int:
        """Bytes that the first step adds to the weights."""
        return self.gradients + self.moments + self.passing


def training_bytes(scope: Scope, spec: ModelSpec, block_length: BlockLength | None = None) -> TrainingBytes:
    """Predicts the bytes that training these tensors takes beside the student.

    Args:
        scope: the tensors that are trained.
        spec: the student's description.
        block_length: lengths of blocks in the student's file; needed where its scales are trained.
    """
    parameters = [
        scope.parameters(layer, block_length and partial(_in_layer, block_length, index))
        for index, layer in enumerate(spec.layers)
    ]
    outside = sum(prod(spec.dimensions(tensor.role)) for tensor in spec.tensors if scope.trains(tensor))
    all_bytes = _FLOAT32 * (sum(parameters) + outside)
    return TrainingBytes(all_bytes, all_bytes, 2 * all_bytes, _FLOAT32 * max(parameters))


def refuse_too_large(
    scope: Scope, spec: ModelSpec, itemsize: int, limit_bytes: int, block_length: BlockLength | None = None
) -> None:
    """Refuses a scope that cannot be trained within the limit with a single layer in memory.

    Args:
        scope: the tensors that are trained.
        spec: the student's description.
        itemsize: bytes of a stored weight.
        limit_bytes: bytes that the process may use.
        block_length: as in :func:`training_bytes`.

    Raises:
        TooLargeError: the message says how much would be needed.
    """
    trained = training_bytes(scope, spec, block_length).total
    layer_bytes = max(layer.parameters for layer in spec.layers) * itemsize
    needed = PROCESS_BYTES + least_bytes(spec, layer_bytes) + trained
    if needed > limit_bytes:
        advice = "train adapters, of a smaller rank, or" if scope.n_experts != 0 else "train less, or"
        raise TooLargeError(
            f"training {scope.name_in(spec)} needs {needed / 1e9:.2f} GB of memory, {trained / 1e9:.2f} GB of it for "
            f"float32 weights, gradients and Adam's moments, but the limit is {limit_bytes / 1e9:.2f} GB: "
            f"{advice} raise --memory"
        )


def _in_layer(block_length: BlockLength, layer: int, role: Role) -> int | None:
    return block_length(role, layer)
