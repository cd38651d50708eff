"""The source of a student's tensors: the original checkpoint, or a file that was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import numpy.typing as npt

from compressors.model.description.roles import Role
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.integer_blocks import BlockType

if TYPE_CHECKING:
    import torch

__all__ = ["ReplacedValues", "StoredType", "TunablePart", "Weights", "WrittenWeights"]

StoredType = GGMLQuantizationType | BlockType
"""The way in which a file stores a tensor: a type of ggml, or blocks that only ONNX Runtime has."""


@dataclass(frozen=True)
class TunablePart:
    """Consecutive bytes of a file, some of which hold tunable values."""

    file: Path
    offset: int
    n_bytes: int
    put: Callable[[npt.NDArray[np.uint8]], None]
    """Writes the new tunable values into these bytes, and leaves the others as they are."""


_MATRICES_OF_AN_EXPERT = 3


class ReplacedValues:
    """Holds the tunable values that take the place of a file's, by the tensor's name, and remembers the last ones read.

    A tensor holds the values of all experts of a layer, and readers visit experts one by one: each expert asks for the
    same three tensors, which would otherwise come from the disk as often as there are experts.

    Args:
        values: the values by name; a lazy mapping may read them on access.
    """

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self._values = values
        self._read = lru_cache(maxsize=_MATRICES_OF_AN_EXPERT)(values.__getitem__)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(name)


class Weights(Protocol):
    """A student's tensors by role, in the student's numbering. A tied head is not among them."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the experts."""

    def dtype_of(self, role: Role, layer: int | None) -> torch.dtype:
        """Dtype of the tensors of a role outside of experts."""

    def tensor(self, role: Role, layer: int | None) -> torch.Tensor:
        """The tensor of a role outside of experts."""

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of :meth:`tensor`, without reading all others where it is large."""

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out``, contiguous, with one expert's gate [F, D], up [F, D] or down [D, F] projection."""


class WrittenWeights(Weights, Protocol):
    """The tensors of a written file, dequantized: float32.

    Some values can be replaced in the finished file, because their place and size stay: its *tunable values*. For a
    router or a norm these are all its values, float32; for a quantized matrix the scales of its blocks [rows, blocks of
    a row, scales of a block], where the rows of all experts follow each other. They come in the student's order, and
    have the tensor's name in llama.cpp (:attr:`~compressors.model.description.tensors.TensorSpec.gguf`) in every
    container. A matrix whose rows are not rows of the file, but parts of them or transposed, has no such scales.
    """

    def stored_type(self, role: Role, layer: int | None, part: int = 0) -> StoredType:
        """The type in which the file stores the tensors of a role; ggml's type where a graph holds the same numbers.

        Args:
            role: the role.
            layer: their layer.
            part: the number of the part, where the file may hold a tensor in several.
        """

    def block_length(self, role: Role, layer: int | None) -> int | None:
        """Consecutive values of a matrix's row that share tunable scales; None: it has no such scales."""

    def tunable(self, role: Role, layer: int | None) -> torch.Tensor:
        """The tunable values of a tensor.

        Raises:
            InputError: it has none: it is a router or norm that is not float32, or a matrix without tunable scales.
        """

    def with_values(self, values: Mapping[str, torch.Tensor]) -> Self:
        """The same weights as if the file had these tunable values; the file is not changed.

        Raises:
            InputError: a tensor has no tunable values, or its values have another shape or dtype.
        """

    def changed_parts(self) -> Iterator[TunablePart]:
        """The parts of the file whose tunable values :meth:`with_values` replaced, a bounded number of bytes each."""
