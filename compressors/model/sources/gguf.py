"""A model's weights as a GGUF file holds them, dequantized by ggml's own kernels: what llama.cpp computes with.

Every value is the kernel's float32. Queries and keys that the file keeps in the order of llama.cpp's interleaved
rotation are put back into that of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import TensorSpec
from compressors.model.errors import InputError
from compressors.model.files.block_scales import block_length, put_scales, scales_of
from compressors.model.files.ggml import GGMLQuantizationType, dequantize_into
from compressors.model.files.gguf_file import GgufEntry, GgufFile
from compressors.model.sources.weights import ReplacedValues, TunablePart

__all__ = ["GgufWeights"]


class GgufWeights:
    """Implements :class:`~compressors.model.sources.weights.WrittenWeights`; opening reads the file's header.

    Args:
        path: the file.
        shape: of the model that it should hold.

    Raises:
        InputError: the file is missing, truncated or not GGUF, or lacks a tensor of a model of this shape.
    """

    dtype = torch.float32

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        self._file = GgufFile(path)
        self._spec = spec
        self._values = ReplacedValues({})
        self._entries = {
            (tensor.role, layer): self._checked_entry(tensor, layer) for tensor, layer in spec.written.places
        }

    def dtype_of(self, role: Role, layer: int | None) -> torch.dtype:
        """Always float32."""
        return self.dtype

    def stored_type(self, role: Role, layer: int | None) -> GGMLQuantizationType:
        """The type of a tensor."""
        entry = self._entries.get((role, layer))
        return GGMLQuantizationType.F32 if entry is None else entry.ggml_type

    def tensor(self, role: Role, layer: int | None) -> torch.Tensor:
        """The tensor of a role that is not an expert's, float32."""
        if (role, layer) not in self._entries:  # the router of one expert: a softmax over one logit, whatever it is
            return torch.zeros(self._spec.dimensions(role, layer))
        shape = self._spec.dimensions(role, layer)
        values_RN = self._rows(role, layer, 0, 1 if len(shape) == 1 else shape[0])
        return self._in_order(role, layer, values_RN, from_file=True).view(shape)

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of :meth:`tensor`; of embedding and head, which are large, only these are read."""
        if role not in (Role.TOKEN_EMBEDDING, Role.HEAD):
            return self.tensor(role, layer)[rows]
        start, stop, _ = rows.indices(self._spec.vocab_size)
        return self._rows(role, layer, start, stop - start)

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out``, float32 and contiguous, with one expert's projection."""
        n_rows = len(out)
        dequantize_into(self._stored(role, layer, expert * n_rows, n_rows), self._entries[role, layer].ggml_type, out)

    def block_length(self, role: Role, layer: int | None) -> int | None:
        """Values of a block, where they share float16 scales."""
        entry = self._entries.get((role, layer))
        return None if entry is None else block_length(entry.ggml_type)

    def tunable(self, role: Role, layer: int | None) -> torch.Tensor:
        """The tunable values of a tensor.

        Raises:
            InputError: it has none.
        """
        entry = self._tunable_entry(role, layer)
        if entry.ggml_type is GGMLQuantizationType.F32:
            return self.tensor(role, layer)
        n_rows = prod(entry.shape[:-1])
        scales = [
            scales_of(self._stored(role, layer, first, min(_ROWS_AT_ONCE, n_rows - first)), entry.ggml_type)
            for first in range(0, n_rows, _ROWS_AT_ONCE)
        ]
        return self._in_order(role, layer, torch.cat(scales), from_file=True)

    def with_values(self, values: Mapping[str, torch.Tensor]) -> Self:
        """The same weights as if the file had these tunable values.

        Raises:
            InputError: they are not of this file.
        """
        for name, tensor in values.items():
            self._check_values(name, tensor)
        changed = copy.copy(self)
        changed._values = ReplacedValues(values)
        return changed

    def changed_parts(self) -> Iterator[TunablePart]:
        """Whole rows, some at a time."""
        for (role, layer), entry in self._entries.items():
            if self._name(role, layer) in self._values:
                n_rows, path = prod(entry.shape[:-1]), self._file.path_of(entry)
                for first in range(0, n_rows, _ROWS_AT_ONCE):
                    n_bytes = min(_ROWS_AT_ONCE, n_rows - first) * entry.row_bytes
                    put = partial(self._put, role, layer, first)
                    yield TunablePart(path, entry.offset + first * entry.row_bytes, n_bytes, put)

    def _rows(self, role: Role, layer: int | None, first: int, n_rows: int) -> torch.Tensor:
        entry = self._entries[role, layer]
        values_RN = torch.empty(n_rows, entry.shape[-1])
        dequantize_into(self._stored(role, layer, first, n_rows), entry.ggml_type, values_RN)
        return values_RN

    def _stored(self, role: Role, layer: int | None, first: int, n_rows: int) -> npt.NDArray[np.uint8]:
        """The file's rows, with the values that replace its own."""
        stored = self._file.read_rows(self._entries[role, layer], first, n_rows)
        if self._name(role, layer) in self._values:
            self._put(role, layer, first, stored)
        return stored

    def _put(self, role: Role, layer: int | None, first: int, stored: npt.NDArray[np.uint8]) -> None:
        """Puts values that replace the file's into the bytes of rows from ``first`` on."""
        entry, values = self._entries[role, layer], self._values[self._name(role, layer)]
        rows_RY = stored.reshape(-1, entry.row_bytes)
        rows = slice(first, first + len(rows_RY))
        if entry.ggml_type is GGMLQuantizationType.F32:
            rows_RY[:] = values.contiguous().view(-1, entry.shape[-1])[rows].view(torch.uint8).numpy()
        else:
            put_scales(rows_RY, entry.ggml_type, self._in_order(role, layer, values, from_file=False)[rows])

    def _in_order(self, role: Role, layer: int | None, values: torch.Tensor, *, from_file: bool) -> torch.Tensor:
        """The rows of a matrix, or their scales, in the other side's order, where the file has its own."""
        if layer is None:
            return values
        transform, sizes = self._spec.tensor(role, layer).gguf.transform, self._spec.layers[layer].sizes
        return transform.read(values, sizes) if from_file else transform.write(values, sizes)

    def _tunable_entry(self, role: Role, layer: int | None) -> GgufEntry:
        """The entry of a tensor with tunable values."""
        entry = self._entries.get((role, layer))
        if entry is None:
            raise InputError(f"{self._file.path} has no tensor of the role {role}: it holds a dense model")
        is_float = not self._spec.tensor(role, layer).is_quantizable
        if is_float and entry.ggml_type is not GGMLQuantizationType.F32:
            raise InputError(f"{self._file.path}: {entry.name} is stored as {entry.ggml_type.name}; it must be F32")
        if not is_float and block_length(entry.ggml_type) is None:
            raise InputError(f"{self._file.path}: {entry.name} is stored as {entry.ggml_type.name}, without scales")
        return entry

    def _check_values(self, name: str, values: torch.Tensor) -> None:
        keys = [key for key in self._entries if self._name(*key) == name]
        if not keys:
            raise InputError(f"{self._file.path} has no tensor {name}, whose values are to be replaced")
        entry = self._tunable_entry(*keys[0])
        if entry.ggml_type is GGMLQuantizationType.F32:
            expected, dtype = entry.shape, torch.float32
        else:
            row_of_blocks = scales_of(self._file.read_rows(entry, 0, 1), entry.ggml_type)
            expected, dtype = (prod(entry.shape[:-1]), *row_of_blocks.shape[1:]), torch.float16
        if tuple(values.shape) != expected or values.dtype != dtype:
            raise InputError(
                f"{self._file.path}: values of shape {list(values.shape)} in {values.dtype} cannot take the place of "
                f"{name}'s, of shape {list(expected)} in {dtype}"
            )

    def _checked_entry(self, tensor: TensorSpec, layer: int | None) -> GgufEntry:
        name, expected = tensor.gguf.name.format(layer=layer), self._spec.dimensions(tensor.role, layer)
        if tensor.is_per_expert and layer is not None:
            expected = (self._spec.layers[layer].n_experts, *expected)
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
