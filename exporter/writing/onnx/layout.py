"""The data file of an ONNX model: every tensor's name, shape, type and place, before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import onnx

from compressors.model.description.roles import Role
from compressors.model.description.rope import Rope
from compressors.model.description.spec import ModelSpec
from compressors.model.files.integer_blocks import ProductInputs
from compressors.model.files.onnx_names import (
    CODES,
    DATA_FILE,
    MODEL_FILE,
    ROTARY_COSINE,
    ROTARY_SINE,
    SCALES,
    rotary_table,
)
from compressors.model.sources.onnx_weights import Form, OnnxWeight, Part, weights_of
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refuse_unless_held
from exporter.writing.onnx.encodings import FLOAT32, Encoding, adapter_encoding, preset_named, unit_encodings

__all__ = ["DATA_FILE", "MODEL_FILE", "TensorLayout", "TensorPlan", "WeightPlan", "plan_tensors"]

# Large tensors start on a page, so that the runtime can map them; the ONNX specification recommends 4096.
_PAGE_BYTES = 4096
_SMALL_ALIGNMENT = 64
_SMALL_TENSOR_BYTES = 16 * _PAGE_BYTES


@dataclass(frozen=True)
class TensorPlan:
    """One initialiser of the graph, and where the data file holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    offset: int

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def onnx_type(self) -> int:
        """ONNX's number of the type."""
        return onnx.helper.np_dtype_to_tensor_dtype(self.dtype)


@dataclass(frozen=True)
class WeightPlan:
    """One weight of the model: its codes (or values) and, if it is quantized, its scales.

    ``roles`` are the source roles whose rows are interleaved: gate and up for the first expert matrix (row 2i is gate
    row i, row 2i + 1 is up row i, as the MoE operators' SwiGLU reads them), otherwise the role itself.
    """

    roles: tuple[Role, ...]
    layer: int | None
    encoding: Encoding
    shape: tuple[int, ...]  # of the values: [D], [rows, columns], or [E, rows, columns] for experts (not if dense)
    codes: TensorPlan
    scales: TensorPlan | None
    part: Part | None = None  # of the tensor; None: it is whole
    n_copies: int = 1  # each row stands so many times, one after the other
    form: Form = Form.WHOLE  # the part of the matrices that it holds
    numbers: tuple[int, ...] = ()  # the experts, or the bases, whose matrices it holds

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """The tensors of the data file that hold the weight."""
        return (self.codes,) if self.scales is None else (self.codes, self.scales)


@dataclass(frozen=True)
class TensorLayout:
    """The data file: weights in the order in which they are written, then the rotary caches."""

    spec: ModelSpec
    weights: tuple[WeightPlan, ...]
    rotaries: Mapping[Rope, tuple[TensorPlan, TensorPlan]]  # cosine, sine [rows, width / 2], see Rope.table_lengths
    data_bytes: int

    def weight(self, role: Role, layer: int | None = None) -> WeightPlan:
        """The weight that holds a role, which is whole; a tied head is the embedding."""
        if role is Role.HEAD and self.spec.tied_embeddings:
            role = Role.TOKEN_EMBEDDING
        (found,) = self._by_role[role, layer]
        return found

    def parts(self, role: Role, layer: int | None = None) -> tuple[WeightPlan, ...]:
        """The weights that hold a role, in their order in the file."""
        return self._by_role[role, layer]

    def factor(self, role: Role, layer: int, form: Form) -> WeightPlan:
        """The weight that holds the bases of a role's matrices, or factors of their adapters."""
        return self._factors[role, layer, form]

    def has(self, role: Role, layer: int | None = None) -> bool:
        """True if a weight holds this role."""
        return (role, layer) in self._by_role

    def is_of_experts(self, weight: WeightPlan) -> bool:
        """True if its rows are those of the student's experts, one after the other."""
        return self.spec.tensor(weight.roles[0], weight.layer).is_per_expert

    @cached_property
    def _by_role(self) -> dict[tuple[Role, int | None], tuple[WeightPlan, ...]]:
        found: dict[tuple[Role, int | None], tuple[WeightPlan, ...]] = {}
        for weight in self.weights:
            for role in weight.roles if weight.form is Form.WHOLE else ():
                found[role, weight.layer] = (*found.get((role, weight.layer), ()), weight)
        return found

    @cached_property
    def _factors(self) -> dict[tuple[Role, int | None, Form], WeightPlan]:
        return {
            (role, weight.layer, weight.form): weight
            for weight in self.weights
            if weight.form is not Form.WHOLE
            for role in weight.roles
        }

    @property
    def tensors(self) -> Iterator[TensorPlan]:
        """Everything in the data file, by rising offset."""
        for weight in self.weights:
            yield from weight.tensors
        for tables in self.rotaries.values():
            yield from tables


def plan_tensors(
    spec: ModelSpec, preset: str, encodings: Mapping[str, str] | None = None, inputs: ProductInputs = "int8"
) -> TensorLayout:
    """Gives every tensor its name, shape, type and offset; reads no weight.

    Args:
        spec: the model.
        preset: a name from :data:`~exporter.writing.onnx.encodings.PRESETS`.
        encodings: names from :data:`~exporter.writing.onnx.encodings.ENCODINGS` for units that differ from the preset,
            by the unit's name (:func:`~exporter.writing.onnx.encodings.onnx_units`).
        inputs: those of the products of 4 bits; no tensor depends on them.

    Raises:
        InputError: there is no such preset, unit or encoding.
        UnsupportedError: ONNX cannot hold the model, or an encoding's blocks do not divide the rows.
    """
    return _planned(spec, preset, tuple((encodings or {}).items()), inputs)


@lru_cache(maxsize=2)  # a plan asks for the size of a file, and then for the memory that it takes
def _planned(
    spec: ModelSpec, preset: str, encodings: tuple[tuple[str, str], ...], inputs: ProductInputs
) -> TensorLayout:
    refuse_unless_held(spec, Container.ONNX)
    return _Planner(spec, unit_encodings(spec, preset_named(preset), dict(encodings), inputs)).plan()


class _Planner:
    def __init__(self, spec: ModelSpec, encodings: Mapping[tuple[Role, int | None], Encoding]) -> None:
        self._spec = spec
        self._encodings = encodings
        self._end = 0

    def plan(self) -> TensorLayout:
        spec = self._spec
        weights = tuple(self._encoded(weight) for weight in weights_of(spec))
        rotaries = {rope: self._tables(rope, number) for number, rope in enumerate(spec.ropes)}
        return TensorLayout(spec, weights, rotaries, self._end)

    def _tables(self, rope: Rope, number: int) -> tuple[TensorPlan, TensorPlan]:
        shape = (sum(rope.table_lengths(self._spec.context_length)), rope.width // 2)
        cosine, sine = (
            self._place(rotary_table(name, number), shape, np.dtype(np.float32))
            for name in (ROTARY_COSINE, ROTARY_SINE)
        )
        return cosine, sine

    def _encoded(self, weight: OnnxWeight) -> WeightPlan:
        name, roles, layer, shape = weight.name, weight.roles, weight.layer, weight.shape
        encoding = self._encodings.get((roles[0], layer), FLOAT32)  # norms and routers belong to no unit
        if weight.form.is_adapter:
            encoding = adapter_encoding(encoding)
        further = (weight.part, weight.n_copies, weight.form, weight.numbers)
        if encoding.blocks is None:
            values = self._place(name, shape, np.dtype(np.float32))
            return WeightPlan(roles, layer, encoding, shape, values, None, *further)
        *rows, columns = shape
        codes = self._place(name + CODES, (*rows, columns * encoding.bits // 8), np.dtype(np.uint8))
        scales = self._place(name + SCALES, (*rows, columns // encoding.blocks.block_size), np.dtype(np.float16))
        return WeightPlan(roles, layer, encoding, shape, codes, scales, *further)

    def _place(self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> TensorPlan:
        n_bytes = math.prod(shape) * dtype.itemsize
        alignment = _PAGE_BYTES if n_bytes >= _SMALL_TENSOR_BYTES else _SMALL_ALIGNMENT
        offset = -(-self._end // alignment) * alignment
        self._end = offset + n_bytes
        return TensorPlan(name, shape, dtype, offset)
