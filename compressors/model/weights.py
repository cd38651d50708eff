"""The source of a student's tensors: the original checkpoint, or a file that was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from compressors.model.families import Role
from compressors.model.ggml import GGMLQuantizationType
from compressors.model.integer_blocks import BlockType

__all__ = ["Place", "StoredType", "Weights", "WrittenWeights"]

StoredType = GGMLQuantizationType | BlockType
"""The way in which a file stores a tensor: a type of ggml, or blocks that only ONNX Runtime has."""


@dataclass(frozen=True)
class Place:
    """The place of a float32 tensor in a file."""

    file: Path
    name: str  # in the file
    offset: int  # of its first byte
    shape: tuple[int, ...]


class Weights(Protocol):
    """A student's tensors by role, in the student's numbering. A tied head is not among them."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the experts."""

    def dtype_of(self, role: Role, layer: int | None) -> torch.dtype:
        """Dtype of the tensors of a role that is not an expert's."""

    def tensor(self, role: Role, layer: int | None) -> torch.Tensor:
        """The tensor of a role that is not an expert's."""

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of :meth:`tensor`, without reading all others where it is large."""

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out``, contiguous, with one expert's gate [F, D], up [F, D] or down [D, F] projection."""


class WrittenWeights(Weights, Protocol):
    """The tensors of a written file, dequantized: float32."""

    def stored_type(self, role: Role, layer: int | None) -> StoredType:
        """The type in which the file stores the tensors of a role; ggml's name where a graph holds the same numbers."""

    def router_place(self, layer: int) -> Place:
        """Returns the place of a layer's router [E, D] in the file.

        Raises:
            InputError: it is not there as float32.
        """
