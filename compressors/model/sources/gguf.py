"""A model's weights as a GGUF file holds them, dequantized by ggml's own kernels: the values of llama.cpp.

Every value is the kernel's float32. Tensors that the file holds in another order than transformers, in several parts,
or with a function applied, are converted back (:mod:`compressors.model.description.transforms`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import TensorSpec
from compressors.model.description.transforms import SAME, Transform
from compressors.model.errors import InputError
from compressors.model.files.block_scales import block_length, put_scales, scales_of
from compressors.model.files.gguf.ggml import dequantize_into
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.gguf.gguf_file import GgufEntry, GgufFile
from compressors.model.sources.weights import ReplacedValues, TunablePart

if TYPE_CHECKING:
    import torch

__all__ = ["GgufWeights"]


@dataclass(frozen=True)
class _Part:
    """A tensor of the file, and the transform that made its values from the model's."""

    entry: GgufEntry
    transform: Transform


class GgufWeights:
    """Implements :class:`~compressors.model.sources.weights.WrittenWeights`; opening reads the file's header.

    Args:
        path: the file.
        spec: the model that it should hold.
        file: the file, if it was opened already.

    Raises:
        InputError: the file is missing, truncated or not GGUF, or lacks a tensor of this model.
    """

    def __init__(self, path: Path, spec: ModelSpec, file: GgufFile | None = None) -> None:
        self._file = GgufFile(path) if file is None else file
        self._spec = spec
        self._values = ReplacedValues({})
        self._parts = {
            (tensor.role, layer): self._checked_parts(tensor, layer) for tensor, layer in spec.written.file_places
        }

    @property
    def dtype(self) -> torch.dtype:
        """The type of all values, float32."""
        import torch

        return torch.float32

    def dtype_of(self, role: Role, layer: int | None) -> torch.dtype:
        """The same."""
        return self.dtype

    def stored_type(self, role: Role, layer: int | None, part: int = 0) -> GGMLQuantizationType:
        """The type of a tensor, or of one of its parts where it has several."""
        parts = self._parts.get((role, layer))
        return GGMLQuantizationType.F32 if parts is None else parts[part].entry.ggml_type

    def stored_types(self, role: Role, layer: int | None) -> tuple[GGMLQuantizationType, ...]:
        """The types of the parts of a tensor, of all experts' where it is theirs."""
        return tuple(part.entry.ggml_type for part in self._parts.get((role, layer), ()))

    def stored_rows(
        self, role: Role, layer: int | None, part: int, rows: slice, expert: int | None = None
    ) -> torch.Tensor:
        """Rows of a part of a tensor as they are stored, uint8 [rows, bytes].

        Args:
            role: the role of the tensor.
            layer: its layer.
            part: the number of the part, where the file holds the tensor in several.
            rows: the rows, counted from the expert's first one.
            expert: the expert; None: the tensor is no expert's.
        """
        import torch

        entry = self._parts[role, layer][part].entry
        n_rows = prod(entry.shape[:-1] if expert is None else entry.shape[1:-1])
        start, stop, _ = rows.indices(n_rows)
        first = start if expert is None else expert * n_rows + start
        return torch.from_numpy(self._file.read_rows(entry, first, stop - start))

    def claimed(self) -> frozenset[str]:
        """The names of the file's tensors that hold the model."""
        return frozenset(part.entry.name for parts in self._parts.values() for part in parts)

    def tensor(self, role: Role, layer: int | None) -> torch.Tensor:
        """The tensor of a role outside of experts, float32."""
        import torch

        out = torch.zeros(self._spec.dimensions(role, layer))
        for part in self._parts.get((role, layer), ()):  # a router of one expert is in no file; any values do
            n_rows = prod(part.entry.shape[:-1])
            part.transform.read(self._rows(role, layer, part, 0, n_rows), out, self._sizes(layer))
        return out

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of :meth:`tensor`; only these are read where the file has them as they are."""
        parts = self._parts.get((role, layer), ())
        if not parts or parts[0].transform is not SAME or len(parts[0].entry.shape) == 1:
            return self.tensor(role, layer)[rows]
        start, stop, _ = rows.indices(parts[0].entry.shape[0])
        return self._rows(role, layer, parts[0], start, stop - start).view(-1, *self._spec.dimensions(role, layer)[1:])

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out``, float32 and contiguous, with one expert's projection."""
        for part in self._parts[role, layer]:
            n_rows = prod(part.transform.shape(tuple(out.shape), self._sizes(layer))[:-1])
            if part.transform is SAME:
                stored = self._stored(role, layer, part, expert * n_rows, n_rows)
                dequantize_into(stored, part.entry.ggml_type, out.view(n_rows, -1))
            else:
                values_RN = self._rows(role, layer, part, expert * n_rows, n_rows)
                part.transform.read(values_RN, out, self._sizes(layer))

    def block_length(self, role: Role, layer: int | None) -> int | None:
        """Values of a block that share float16 scales; None without such scales, or if rows are not the tensor's."""
        parts = self._parts.get((role, layer))
        return (
            block_length(parts[0].entry.ggml_type) if parts is not None and self._has_same_rows(layer, parts) else None
        )

    def tunable(self, role: Role, layer: int | None) -> torch.Tensor:
        """The tunable values of a tensor.

        Raises:
            InputError: the tensor has none.
        """
        import torch

        part = self._tunable_part(role, layer)
        entry = part.entry
        if entry.ggml_type is GGMLQuantizationType.F32:
            return self.tensor(role, layer)
        n_rows = prod(entry.shape[:-1])
        scales = torch.cat([
            scales_of(self._stored(role, layer, part, first, min(_ROWS_AT_ONCE, n_rows - first)), entry.ggml_type)
            for first in range(0, n_rows, _ROWS_AT_ONCE)
        ])  # fmt: skip
        found = torch.empty_like(scales)
        part.transform.read(scales, found, self._sizes(layer))
        return found

    def with_values(self, values: Mapping[str, torch.Tensor]) -> Self:
        """The same weights as if the file had these tunable values.

        Raises:
            InputError: the file has no such values.
        """
        for name, tensor in values.items():
            self._check_values(name, tensor)
        changed = copy.copy(self)
        changed._values = ReplacedValues(values)
        return changed

    def changed_parts(self) -> Iterator[TunablePart]:
        """Yields whole rows, some at a time."""
        for (role, layer), parts in self._parts.items():
            if self._name(role, layer) not in self._values:
                continue
            for part in parts:
                entry, n_rows = part.entry, prod(part.entry.shape[:-1])
                for first in range(0, n_rows, _ROWS_AT_ONCE):
                    n_bytes = min(_ROWS_AT_ONCE, n_rows - first) * entry.row_bytes
                    put = partial(self._put, role, layer, part, first)
                    yield TunablePart(self._file.path_of(entry), entry.offset + first * entry.row_bytes, n_bytes, put)

    def _rows(self, role: Role, layer: int | None, part: _Part, first: int, n_rows: int) -> torch.Tensor:
        """Rows of the file, counted through all leading axes, dequantized."""
        import torch

        values_RN = torch.empty(n_rows, part.entry.shape[-1])
        dequantize_into(self._stored(role, layer, part, first, n_rows), part.entry.ggml_type, values_RN)
        return values_RN

    def _stored(self, role: Role, layer: int | None, part: _Part, first: int, n_rows: int) -> npt.NDArray[np.uint8]:
        """The file's rows, with the values that replace its own."""
        stored = self._file.read_rows(part.entry, first, n_rows)
        if self._name(role, layer) in self._values:
            self._put(role, layer, part, first, stored)
        return stored

    def _put(self, role: Role, layer: int | None, part: _Part, first: int, stored: npt.NDArray[np.uint8]) -> None:
        """Puts values that replace the file's into the bytes of rows from ``first`` on."""
        import torch

        entry = part.entry
        values = part.transform.write(self._values[self._name(role, layer)], self._sizes(layer))
        rows_RY = stored.reshape(-1, entry.row_bytes)
        rows = slice(first, first + len(rows_RY))
        if entry.ggml_type is GGMLQuantizationType.F32:
            rows_RY[:] = values.contiguous().view(-1, entry.shape[-1])[rows].view(torch.uint8).numpy()
        else:
            put_scales(rows_RY, entry.ggml_type, values[rows])

    def _sizes(self, layer: int | None) -> Mapping[str, int]:
        return {} if layer is None else self._spec.blocks[layer].sizes

    def _has_same_rows(self, layer: int | None, parts: Sequence[_Part]) -> bool:
        """True if the rows of the file are the tensor's, perhaps with some in another order."""
        return len(parts) == 1 and parts[0].transform.rows_together(self._sizes(layer)) is not None

    def _tunable_part(self, role: Role, layer: int | None) -> _Part:
        """The first part of a tensor with tunable values."""
        parts = self._parts.get((role, layer))
        if parts is None:
            raise InputError(f"{self._file.path} has no tensor of the role {role}: it holds a dense model")
        entry = parts[0].entry
        is_float = not self._spec.tensor(role, layer).is_quantizable
        if is_float and entry.ggml_type is not GGMLQuantizationType.F32:
            raise InputError(f"{self._file.path}: {entry.name} is stored as {entry.ggml_type.name}; it must be F32")
        if not is_float and self.block_length(role, layer) is None:
            raise InputError(f"{self._file.path}: {entry.name} is stored as {entry.ggml_type.name}, without scales")
        return parts[0]

    def _check_values(self, name: str, values: torch.Tensor) -> None:
        import torch

        places = [place for place in self._parts if self._name(*place) == name]
        if not places:
            raise InputError(f"{self._file.path} has no tensor {name}, whose values are to be replaced")
        entry = self._tunable_part(*places[0]).entry
        expected: tuple[int, ...]
        if entry.ggml_type is GGMLQuantizationType.F32:
            expected, dtype = self._spec.dimensions(*places[0]), torch.float32
        else:
            row_of_blocks = scales_of(self._file.read_rows(entry, 0, 1), entry.ggml_type)
            expected, dtype = (prod(entry.shape[:-1]), *row_of_blocks.shape[1:]), torch.float16
        if tuple(values.shape) != expected or values.dtype != dtype:
            raise InputError(
                f"{self._file.path}: values of shape {list(values.shape)} in {values.dtype} cannot take the place of "
                f"{name}'s, of shape {list(expected)} in {dtype}"
            )

    def _checked_parts(self, tensor: TensorSpec, layer: int | None) -> tuple[_Part, ...]:
        dimensions = self._spec.dimensions(tensor.role, layer)
        parts = []
        for gguf in tensor.gguf_parts:
            expected = gguf.transform.shape(dimensions, self._sizes(layer))
            if tensor.is_per_expert and layer is not None:
                expected = (self._spec.blocks[layer].n_experts, *expected)
            parts.append(_Part(self._checked_entry(gguf.name.format(layer=layer), expected), gguf.transform))
        return tuple(parts)

    def _checked_entry(self, name: str, expected: tuple[int, ...]) -> GgufEntry:
        entry = self._file.tensors.get(name)
        if entry is None:
            raise InputError(f"{self._file.path} has no tensor {name}: it does not hold this model")
        if entry.shape != expected:
            raise InputError(
                f"{self._file.path}: tensor {name} has shape {list(entry.shape)}, but the model's is {list(expected)}"
            )
        return entry

    def _name(self, role: Role, layer: int | None) -> str:
        return self._spec.written.tensor(role, layer).gguf.name.format(layer=layer)


_ROWS_AT_ONCE = 4096
