"""A model's weights as our ONNX folder holds them, dequantized: the values that ONNX Runtime computes with.

``model.onnx`` names its weights and says where in ``model.onnx.data`` they lie. A weight is one float32 tensor, or
codes and scales (:mod:`compressors.model.files.onnx_blocks`), whose numbers tell bits and block size. Tensors of all
experts of a layer that have one name, gate and up, are one weight, whose rows alternate; a tensor of matrices that
heads use one by one is a weight for each of them (:mod:`compressors.model.sources.onnx_weights`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx
import torch

from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.description.spec import ModelSpec, Place
from compressors.model.description.tensors import TensorSpec
from compressors.model.errors import InputError
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.integer_blocks import BITS, BlockType, IntegerBlocks
from compressors.model.files.onnx_blocks import unpack
from compressors.model.files.onnx_graph import external_place, read_graph
from compressors.model.files.onnx_names import CODES, DATA_FILE, MATRIX, MODEL_FILE, SCALES, expert_matrix
from compressors.model.files.raw_file import RawFile
from compressors.model.names import shown
from compressors.model.sources.onnx_weights import Form, OnnxWeight, Part, weights_of
from compressors.model.sources.weights import ReplacedValues, StoredType, TunablePart

__all__ = ["OnnxWeights"]


_NUMPY_TYPES: Mapping[int, np.dtype[Any]] = {
    onnx.TensorProto.FLOAT: np.dtype(np.float32),
    onnx.TensorProto.UINT8: np.dtype(np.uint8),
    onnx.TensorProto.FLOAT16: np.dtype(np.float16),
}


_BYTE_BITS = 8
_OF_GGML: Mapping[BlockType, StoredType] = {
    BlockType(4, 32): GGMLQuantizationType.Q4_0,
    BlockType(8, 32): GGMLQuantizationType.Q8_0,
}
"""The ggml types that hold the same numbers; ggml's kernels make them."""


@dataclass(frozen=True)
class _Stored:
    """One tensor of the data file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def n_values(self) -> int:
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n_values * self.dtype.itemsize


@dataclass(frozen=True)
class _Weight:
    """A weight: all its rows' values, or their codes and scales."""

    roles: tuple[Role, ...]
    shape: tuple[int, ...]
    codes: _Stored
    scales: _Stored | None
    part: Part | None = None
    n_copies: int = 1

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def blocks(self) -> BlockType | None:
        """The block type of the stored values; None if they are float32."""
        if self.scales is None:
            return None
        n_values = prod(self.shape)
        return BlockType(_BYTE_BITS * self.codes.n_values // n_values, n_values // max(1, self.scales.n_values))

    @property
    def n_together(self) -> int:
        """The rows that stand for one row of each role: all roles', or copies."""
        return len(self.roles) * self.n_copies

    def rows_of(self, role: Role, rows_RN: npt.NDArray[Any], copy: int = 0) -> npt.NDArray[Any]:
        """A view of the rows that are a role's; they begin with a row of the first role."""
        return rows_RN[self.roles.index(role) + copy :: self.n_together]

    @property
    def is_whole(self) -> bool:
        """True if the stored tensors fit this shape and their types belong together."""
        codes, scales, blocks = self.codes, self.scales, self.blocks
        if scales is None or blocks is None:
            return codes.dtype == np.float32 and codes.shape == self.shape
        types = codes.dtype == np.uint8 and scales.dtype == np.float16
        fits = blocks.bits in BITS and blocks.block_size > 0 and self.shape[-1] % blocks.block_size == 0
        n_values = prod(self.shape)
        n_codes, n_scales = n_values * blocks.bits // _BYTE_BITS, n_values // max(1, blocks.block_size)
        return types and fits and (codes.n_values, scales.n_values) == (n_codes, n_scales)


class OnnxWeights:
    """Implements :class:`~compressors.model.sources.weights.WrittenWeights`; opening reads the graph.

    Args:
        folder: the folder with ``model.onnx`` and ``model.onnx.data``.
        spec: the model that it should hold.

    Raises:
        InputError: a file is missing, truncated or damaged, or lacks a tensor of this model.
    """

    dtype = torch.float32

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self._graph_file = folder / MODEL_FILE
        self._data = RawFile(folder / DATA_FILE)
        self._spec = spec
        self._values = ReplacedValues({})
        self._replaced: Mapping[_Weight, Mapping[Role, str]] = {}  # names of a weight's replaced values
        tensors = self._tensors()
        self._tensor_specs: Mapping[Place, TensorSpec] = {
            (tensor.role, layer): tensor for tensor, layer in spec.written.places
        }
        self._weights: dict[Place, tuple[_Weight, ...]] = {}
        self._factors: dict[tuple[Place, Form], _Weight] = {}  # of experts that stand on bases
        for weight in weights_of(spec):
            found = self._weight(weight, tensors)
            if weight.form is not Form.WHOLE:
                self._factors |= {((role, weight.layer), weight.form): found for role in weight.roles}
                continue
            for role in weight.roles:
                self._weights[role, weight.layer] = (*self._weights.get((role, weight.layer), ()), found)

    def dtype_of(self, role: Role, layer: int | None) -> torch.dtype:
        """The type of all values, float32."""
        return self.dtype

    def stored_type(self, role: Role, layer: int | None, part: int = 0) -> StoredType:
        """F32, ggml's type of blocks of 32 values in 4 or 8 bits, or bits and block size."""
        weights = self._weights.get((role, layer)) or self._of_bases(role, layer)
        blocks = weights[min(part, len(weights) - 1)].blocks if weights else None
        return GGMLQuantizationType.F32 if blocks is None else _OF_GGML.get(blocks, blocks)

    def tensor(self, role: Role, layer: int | None) -> torch.Tensor:
        """The tensor of a role that is not an expert's, float32."""
        weights = self._weights.get((role, layer))
        if weights is None:  # the router of one expert: a softmax over one logit, whatever it is
            return torch.zeros(self._spec.dimensions(role, layer))
        if weights[0].part is None:
            return self._rows(weights[0], 0, weights[0].n_rows).view(weights[0].shape)
        out = torch.empty(self._spec.dimensions(role, layer))
        for weight in weights:
            assert weight.part is not None
            out[weight.part.rows] = weight.part.turned(self._rows(weight, 0, weight.n_rows))
        return out

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of :meth:`tensor`."""
        weight = self._whole(role, layer)
        if weight is None:
            return self.tensor(role, layer)[rows]
        start, stop, _ = rows.indices(weight.n_rows)
        return self._rows(weight, start, stop - start)

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out`` with one expert's projection."""
        bases = self._spec.written.layers[layer].bases
        if bases is not None and bases.base_of[expert] is not None:
            out.copy_(self._on_base((role, layer), expert, bases))
            return
        place = expert if bases is None else bases.own.index(expert)
        (weight,) = self._weights[role, layer]
        n_rows = len(out) * weight.n_together
        rows = self._rows(weight, place * n_rows, n_rows)
        out.copy_(rows[weight.roles.index(role) :: weight.n_together])

    def _on_base(self, place: Place, expert: int, bases: SharedBases) -> torch.Tensor:
        """The matrix of an expert that stands on a base: float32 [rows, columns]."""
        number, base = bases.replaced.index(expert), bases.base_of[expert]
        a_RI = self._factor(place, Form.INPUTS, number, bases.rank)
        b_RO = self._factor(place, Form.OUTPUTS, number, bases.rank)
        product_OI = b_RO.T.contiguous() @ a_RI
        if base is None or base == SharedBases.ZERO:
            return product_OI
        return self._base(place, base, *product_OI.shape) + product_OI

    def _base(self, place: Place, base: int, n_rows: int, n_columns: int) -> torch.Tensor:
        """One role's matrix of a base: float32 [rows, columns]."""
        joined = self._factors.get((place, Form.JOINED_BASES))
        if joined is None:
            return self._factor(place, Form.BASE, base, n_rows)
        return self._rows(joined, 0, n_rows)[:, base * n_columns :][:, :n_columns]

    def _factor(self, place: Place, form: Form, number: int, n_rows: int) -> torch.Tensor:
        """One role's rows of a base of its own, or of a factor: float32 [rows, columns]."""
        weight = self._factors[place, form]
        first = (number * len(weight.roles) + weight.roles.index(place[0])) * n_rows
        return self._rows(weight, first, n_rows)

    def _of_bases(self, role: Role, layer: int | None) -> tuple[_Weight, ...]:
        """The weight that says how the matrices of a layer are stored that all stand on bases: that of the bases."""
        forms = (Form.BASE, Form.JOINED_BASES, Form.INPUTS)
        found = (self._factors.get(((role, layer), form)) for form in forms)
        return tuple(weight for weight in found if weight is not None)[:1]

    def block_length(self, role: Role, layer: int | None) -> int | None:
        """The number of values of a row that share a scale; None if the tensor has no scales of its own rows."""
        weight = None if self._of_bases(role, layer) else self._whole(role, layer)
        return None if weight is None or weight.blocks is None else weight.blocks.block_size

    def tunable(self, role: Role, layer: int | None) -> torch.Tensor:
        """The tunable values of a tensor.

        Raises:
            InputError: the tensor has none.
        """
        weight = self._tunable_weight(role, layer)
        if weight.scales is None:
            return self.tensor(role, layer)
        scales_RN = weight.rows_of(role, self._read(weight, weight.scales, 0, weight.n_rows))
        return torch.from_numpy(scales_RN.copy())[..., None]

    def with_values(self, values: Mapping[str, torch.Tensor]) -> Self:
        """The same weights as if the file had these tunable values.

        Raises:
            InputError: the file has no such values.
        """
        for name, tensor in values.items():
            self._check_values(name, tensor)
        changed = copy.copy(self)
        changed._values = ReplacedValues(values)
        changed._replaced = self._names_by_weight(values)
        return changed

    def changed_parts(self) -> Iterator[TunablePart]:
        """Yields the tensors whose values are replaced, each as a whole."""
        for place, weights in self._weights.items():
            for weight in weights if self._gguf_name(place) in self._values else ():
                stored = weight.codes if weight.scales is None else weight.scales
                yield TunablePart(self._data.path, stored.offset, stored.n_bytes, partial(self._put, weight, stored))

    def _put(self, weight: _Weight, stored: _Stored, data: npt.NDArray[np.uint8]) -> None:
        """Writes the values that replace the file's into the bytes of a tensor."""
        self._replace(weight, data.view(stored.dtype).reshape(weight.n_rows, -1), 0)

    def _gguf_name(self, place: Place) -> str:
        return self._tensor_specs[place].gguf.name.format(layer=place[1])

    def _rows(self, weight: _Weight, first: int, n_rows: int) -> torch.Tensor:
        """Rows counted through all leading axes: float32 [rows, columns]."""
        codes = self._read(weight, weight.codes, first, n_rows)
        if weight.scales is None:
            return torch.from_numpy(codes)
        bits = _BYTE_BITS * weight.codes.n_values // prod(weight.shape)
        scales_RK = self._read(weight, weight.scales, first, n_rows).astype(np.float32)
        return torch.from_numpy(IntegerBlocks(unpack(codes, bits), scales_RK, bits).values())

    def _read(self, weight: _Weight, stored: _Stored, first: int, n_rows: int) -> npt.NDArray[Any]:
        columns = stored.n_values // weight.n_rows
        values = np.empty((n_rows, columns), dtype=stored.dtype)
        offset = stored.offset + first * columns * stored.dtype.itemsize
        self._data.fill(stored.name, values.reshape(-1).view(np.uint8).data, offset)
        if weight in self._replaced and stored is (weight.codes if weight.scales is None else weight.scales):
            self._replace(weight, values, first)
        return values

    def _replace(self, weight: _Weight, values_RN: npt.NDArray[Any], first: int) -> None:
        """Writes the values that replace the file's into some rows, which are whole experts' where roles alternate."""
        for role, name in self._replaced[weight].items():
            of_role_RN = self._values[name].reshape(-1, values_RN.shape[1]).numpy()
            for copied in range(weight.n_copies):
                own_RN = weight.rows_of(role, values_RN, copied)
                own_RN[:] = of_role_RN[first // weight.n_together :][: len(own_RN)]

    def _names_by_weight(self, values: Mapping[str, torch.Tensor]) -> Mapping[_Weight, Mapping[Role, str]]:
        """Returns the names among ``values`` whose rows each weight holds."""
        names: dict[_Weight, dict[Role, str]] = {}
        for place, weights in self._weights.items():
            name = self._gguf_name(place)
            for weight in weights if name in values else ():
                names.setdefault(weight, {})[place[0]] = name
        return names

    def _whole(self, role: Role, layer: int | None) -> _Weight | None:
        """The weight that holds a tensor; None if there is none, or one for each of its parts."""
        weights = self._weights.get((role, layer), ())
        return weights[0] if len(weights) == 1 else None

    def _tunable_weight(self, role: Role, layer: int | None) -> _Weight:
        weights = self._weights.get((role, layer), ())
        if self._of_bases(role, layer):
            raise InputError(f"{self._graph_file}: experts of layer {layer} stand on bases, so no scales are theirs")
        if not weights:
            raise InputError(f"{self._graph_file} has no tensor of the role {role}: it holds a dense model")
        weight = weights[0]
        if weight.part is not None:
            raise InputError(f"{self._graph_file}: the {role} is in parts, so it has no scales of whole rows")
        is_float = not self._tensor_specs[role, layer].is_quantizable
        if is_float != (weight.scales is None):
            what = "quantized; it must be float32" if is_float else "not quantized, so it has no scales"
            raise InputError(f"{self._graph_file}: {weight.codes.name} is {what}")
        return weight

    def _check_values(self, name: str, values: torch.Tensor) -> None:
        keys = [key for key in self._weights if self._gguf_name(key) == name]
        if not keys:
            raise InputError(f"{self._graph_file} has no tensor {name}, whose values are to be replaced")
        expected = self.tunable(*keys[0])
        if values.shape != expected.shape or values.dtype != expected.dtype:
            raise InputError(
                f"{self._graph_file}: values of shape {list(values.shape)} in {values.dtype} cannot take the place of "
                f"{name}'s, of shape {list(expected.shape)} in {expected.dtype}"
            )

    def _tensors(self) -> dict[str, _Stored]:
        """Everything in the data file, by name."""
        found = [tensor for tensor in read_graph(self._graph_file).initializer if tensor.external_data]
        return {tensor.name: self._stored(tensor) for tensor in found}

    def _stored(self, tensor: onnx.TensorProto) -> _Stored:
        place = external_place(self._graph_file, tensor)
        if place.file.name != DATA_FILE or tensor.data_type not in _NUMPY_TYPES:
            raise InputError(
                f"{self._graph_file} is not one of our models (tensor {shown(tensor.name)} is of another kind)"
            )
        stored = _Stored(tensor.name, _NUMPY_TYPES[tensor.data_type], tuple(tensor.dims), place.offset)
        if stored.offset + stored.n_bytes > self._data.size:
            raise InputError(f"{self._data.path} is truncated: tensor {shown(tensor.name)} ends after the file does")
        return stored

    def _weight(self, weight: OnnxWeight, tensors: dict[str, _Stored]) -> _Weight:
        name, shape = weight.name, weight.shape
        keys = (name, name + CODES, name + CODES + MATRIX)
        codes = next(filter(None, (_tensor(tensors, key, shape) for key in keys)), None)
        if codes is None:
            raise InputError(f"{self._graph_file} has no tensor {name}: it does not hold this model")
        scales = None if codes.name == name else _tensor(tensors, name + SCALES, shape)
        found = _Weight(weight.roles, shape, codes, scales, weight.part, weight.n_copies)
        if not found.is_whole:
            raise InputError(
                f"{self._graph_file}: tensor {codes.name} has shape {list(codes.shape)}, which is not that of the "
                f"model's, {list(shape)}"
            )
        return found


def _tensor(tensors: Mapping[str, _Stored], name: str, shape: tuple[int, ...]) -> _Stored | None:
    """The tensor of a name, which may be in parts, one for each expert, that follow each other; None: there is none."""
    if name in tensors or len(shape) != _EXPERT_AXES:
        return tensors.get(name)
    stem = name.removesuffix(MATRIX)
    names = [expert_matrix(stem, expert) + name[len(stem) :] for expert in range(shape[0])]
    first = tensors.get(names[0])
    if first is None:
        return None
    offsets = [first.offset + expert * first.n_bytes for expert in range(shape[0])]
    wanted = [replace(first, name=part, offset=offset) for part, offset in zip(names, offsets, strict=True)]
    is_one = [tensors.get(part) for part in names] == wanted
    return replace(first, name=name, shape=(shape[0], *first.shape)) if is_one else None


_EXPERT_AXES = 3  # of a tensor with the matrices of all experts
