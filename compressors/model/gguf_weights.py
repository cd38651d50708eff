"""A model's weights as a GGUF file holds them, dequantized by ggml's own kernels: what llama.cpp computes with.

Every value is the kernel's float32. Queries and keys that the file keeps in the order of llama.cpp's interleaved
rotation are put back into that of transformers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.checkpoint import role_shape
from compressors.model.errors import InputError
from compressors.model.families import Role
from compressors.model.ggml import GGMLQuantizationType, dequantize_into
from compressors.model.gguf_file import GgufEntry, GgufFile
from compressors.model.shape import MoeShape
from compressors.model.weights import Place

__all__ = ["GgufWeights"]


class GgufWeights:
    """Implements :class:`~compressors.model.weights.WrittenWeights`; opening reads the file's header.

    Args:
        path: the file.
        shape: of the model that it should hold.

    Raises:
        InputError: the file is missing, truncated or not GGUF, or lacks a tensor of a model of this shape.
    """

    dtype = torch.float32

    def __init__(self, path: Path, shape: MoeShape) -> None:
        self._file = GgufFile(path)
        self._shape = shape
        self._entries = {
            (role, layer): self._checked_entry(role, layer)
            for role in shape.stored_roles
            for layer in ([None] if role.is_global else range(shape.n_layers))
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
            return torch.zeros(role_shape(role, self._shape))
        shape = role_shape(role, self._shape)
        values_RN = self._rows(role, layer, 0, 1 if len(shape) == 1 else shape[0])
        if self._shape.family.gguf.rotary_is_interleaved and role in (Role.QUERY, Role.KEY):
            values_RN = _rotate_half_rows(values_RN, shape[0] // self._shape.head_dim)
        return values_RN.view(shape)

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of :meth:`tensor`; of embedding and head, which are large, only these are read."""
        if role not in (Role.TOKEN_EMBEDDING, Role.HEAD):
            return self.tensor(role, layer)[rows]
        start, stop, _ = rows.indices(self._shape.vocab_size)
        return self._rows(role, layer, start, stop - start)

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out``, float32 and contiguous, with one expert's projection."""
        n_rows = len(out)
        dequantize_into(self._stored(role, layer, expert * n_rows, n_rows), self._entries[role, layer].ggml_type, out)

    def router_place(self, layer: int) -> Place:
        """Returns the place of a layer's router.

        Raises:
            InputError: it is not there as float32.
        """
        entry = self._entries.get((Role.ROUTER, layer))
        if entry is None:
            raise InputError(f"{self._file.path} holds a dense model, which has no routers")
        if entry.ggml_type is not GGMLQuantizationType.F32:
            raise InputError(
                f"{self._file.path}: {entry.name} is stored as {entry.ggml_type.name}; routers must be F32"
            )
        return Place(self._file.path_of(entry), entry.name, entry.offset, entry.shape)

    def _rows(self, role: Role, layer: int | None, first: int, n_rows: int) -> torch.Tensor:
        entry = self._entries[role, layer]
        values_RN = torch.empty(n_rows, entry.shape[-1])
        dequantize_into(self._stored(role, layer, first, n_rows), entry.ggml_type, values_RN)
        return values_RN

    def _stored(self, role: Role, layer: int | None, first: int, n_rows: int) -> npt.NDArray[np.uint8]:
        return self._file.read_rows(self._entries[role, layer], first, n_rows)

    def _checked_entry(self, role: Role, layer: int | None) -> GgufEntry:
        name, expected = self._shape.gguf_name(role, layer), role_shape(role, self._shape)
        if role.is_expert and not self._shape.is_dense:
            expected = (self._shape.n_experts, *expected)
        entry = self._file.tensors.get(name)
        if entry is None:
            raise InputError(f"{self._file.path} has no tensor {name}: it does not hold this model")
        if entry.shape != expected:
            raise InputError(
                f"{self._file.path}: tensor {name} has shape {list(entry.shape)}, but the model's is {list(expected)}"
            )
        return entry


def _rotate_half_rows(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Puts rows 2i and 2i + 1 of each head, which one rotation mixes, where transformers has them: i and i + half."""
    n_rows, n_inputs = weight.shape
    return weight.reshape(n_heads, n_rows // n_heads // 2, 2, n_inputs).transpose(1, 2).reshape(n_rows, n_inputs)
