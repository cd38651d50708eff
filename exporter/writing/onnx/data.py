"""The weights of an ONNX data file, piece by piece: how a piece is read and quantized, and where its bytes go.

A piece is one expert of a weight, or a slice of another weight. With error feedback both weights of an expert are one
piece, since the inputs of down are made from gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressors.calibration.statistics import Importance
from compressors.model.description.roles import Role
from compressors.model.files.integer_blocks import IntegerBlocks
from compressors.model.files.onnx_blocks import from_q4_0, from_q8_0, pack
from compressors.model.sources.onnx_weights import Form
from compressors.model.sources.student import Student
from compressors.quantize import GGMLQuantizationType
from compressors.quantize.blocks import search_blocks
from compressors.quantize.feedback import Feedback, quantize_blocks_with_feedback, quantize_rows_with_feedback
from compressors.quantize.kernels import quantize_rows
from exporter.writing.feedback import ExpertFeedback, StudentFeedback
from exporter.writing.onnx.encodings import Encoding
from exporter.writing.onnx.layout import TensorLayout, WeightPlan
from exporter.writing.pieces import Piece, last_of_layers, row_slices, whole_experts
from exporter.writing.resumable import Part

__all__ = ["Place", "weight_pieces"]

_UNPACKED = {GGMLQuantizationType.Q4_0: from_q4_0, GGMLQuantizationType.Q8_0: from_q8_0}


def weight_pieces(
    student: Student, layout: TensorLayout, importance: Importance, feedback: StudentFeedback | None
) -> Iterator[Piece]:
    """Yields all weights of a layout; without feedback, in the file's order.

    Args:
        student: the source of the values.
        layout: the places of the weights.
        importance: weighs quantization errors.
        feedback: chooses the codes; None leaves them to the kernels and to the search for scales.
    """
    weights = _Weights(student, importance, feedback)
    all_rows = _plan_rows(layout)
    groups = [(rows,) for rows in all_rows] if feedback is None else list(whole_experts(all_rows))
    layers = {} if feedback is None else last_of_layers(groups)
    end = 0
    for number, group in enumerate(groups):
        end = max(end, *(place.end for rows in group for place in rows.places))
        n_bytes = sum(place.n_bytes for rows in group for place in rows.places)
        then = feedback.release(layers[number]) if feedback is not None and number in layers else None
        yield Piece(n_bytes, end, partial(weights.read, group), then, group[0].layer, group[0].is_head)


@dataclass(frozen=True)
class Place:
    """Some bytes of the data file."""

    offset: int
    n_bytes: int

    @property
    def end(self) -> int:
        """The offset of the first byte after it."""
        return self.offset + self.n_bytes

    def part(self, values: npt.NDArray[np.generic]) -> Part:
        """The values as bytes, with the offset where they belong."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        assert data.nbytes == self.n_bytes, f"{data.nbytes} bytes for a place of {self.n_bytes}"
        return self.offset, data


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of one weight."""

    weight: WeightPlan
    number: int | None  # of the expert or the base whose matrix it is; None: any other matrix
    rows: slice

    @property
    def expert(self) -> int | None:
        """The expert whose whole matrix it is; None for any other matrix."""
        return self.number if self.weight.form is Form.WHOLE else None

    @property
    def layer(self) -> int | None:
        """The decoder layer; None outside of the layers."""
        return self.weight.layer

    @property
    def is_head(self) -> bool:
        """True for the head, unless it is the embedding."""
        return self.weight.roles == (Role.HEAD,)

    @property
    def places(self) -> list[Place]:
        """The places of their codes in the file, and of their scales if they have any."""
        places = []
        for tensor in self.weight.tensors:
            row_bytes = tensor.n_bytes // prod(self.weight.shape[:-1])
            n_rows = self.rows.stop - self.rows.start
            places.append(Place(tensor.offset + self.rows.start * row_bytes, n_rows * row_bytes))
        return places

    @property
    def has_codes(self) -> bool:
        """True if they are quantized."""
        return self.weight.encoding.blocks is not None


def _plan_rows(layout: TensorLayout) -> Iterator[_Rows]:
    """The weights in the file's order: whole experts, and slices of other matrices."""
    for weight in layout.weights:
        if layout.is_of_experts(weight):
            # A dense feed-forward is the only expert; rows of joined bases hold values of all.
            numbers = (0,) if weight.form is Form.JOINED_BASES else weight.numbers or (0,)
            rows_each = prod(weight.shape[:-1]) // len(numbers)
            for place, number in enumerate(numbers):
                yield _Rows(weight, number, slice(place * rows_each, (place + 1) * rows_each))
        else:
            for rows in row_slices(prod(weight.shape[:-1]), weight.shape[-1]):
                yield _Rows(weight, None, rows)


@dataclass(frozen=True)
class _Matrix:
    """Rows of one role, with the importance of their columns."""

    values_RN: torch.Tensor  # storage dtype
    importance_N: torch.Tensor | None
    name: str


@dataclass(frozen=True)
class _Values:
    """Rows of a weight with their values, by role; rows of several roles alternate."""

    rows: _Rows
    matrices: dict[Role, _Matrix]

    def encoded(self, feedback: Feedback | None) -> list[Part]:
        """The encoded rows, each part with its offset in the file."""
        weight, places = self.rows.weight, self.rows.places
        encoding = weight.encoding
        if encoding.blocks is None:
            float32 = [
                quantize_rows(matrix.values_RN, GGMLQuantizationType.F32, name=matrix.name)
                for matrix in self.matrices.values()
            ]
            return [places[0].part(self._together(float32))]
        quantized = [_blocks(matrix, encoding, feedback) for matrix in self.matrices.values()]
        codes = self._together([pack(blocks.codes_RN, blocks.bits) for blocks in quantized])
        scales = self._together([blocks.scales_RK.astype(np.float16) for blocks in quantized])
        return [places[0].part(codes), places[1].part(scales)]

    def _together(self, rows: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The rows of all roles as the weight has them: alternating, with copies; or one role's after the other's."""
        weight = self.rows.weight
        return _alternating(list(rows) * weight.n_copies) if weight.form is Form.WHOLE else np.concatenate(rows)


class _Weights:
    """Reads a student's weights, and returns functions that quantize them."""

    def __init__(self, student: Student, importance: Importance, feedback: StudentFeedback | None) -> None:
        self._student = student
        self._importance = importance
        self._feedback = feedback

    def read(self, group: tuple[_Rows, ...]) -> Callable[[], list[Part]]:
        """Reads rows of one weight, or all weights of one expert; the function that it returns quantizes them."""
        values = [_Values(rows, {role: self._matrix(rows, role) for role in rows.weight.roles}) for rows in group]
        first, layer = group[0], group[0].weight.layer
        if self._feedback is None or not any(rows.has_codes for rows in group):
            return partial(_encoded, values, None)
        if first.weight.form is not Form.WHOLE:
            return partial(_encoded, values, None)
        if first.expert is None:
            is_turned = first.weight.part is not None and first.weight.part.is_transposed
            feedback = None if is_turned else self._feedback.matrix(first.weight.roles[0], layer)
            return partial(_encoded, values, feedback)
        assert layer is not None
        return partial(_encoded_expert, values, first.expert, self._feedback.experts(layer))

    def _matrix(self, rows: _Rows, role: Role) -> _Matrix:
        weight, student = rows.weight, self._student
        weights = self._importance.get((role, weight.layer))
        if weight.form is not Form.WHOLE:
            return self._factor(rows, role, weights)
        if rows.expert is not None:
            assert weight.layer is not None
            values_RN = student.expert(role, weight.layer, rows.expert)
            name = f"{weight.codes.name}[{rows.expert}] ({role})"
            return _Matrix(values_RN, None if weights is None else weights[rows.expert], name)
        if weight.part is not None:
            values = weight.part.turned(student.rows(role, weight.layer, weight.part.rows))
            return _Matrix(values[rows.rows], None if weight.part.is_transposed else weights, weight.codes.name)
        is_vector = len(weight.shape) == 1  # a norm: a matrix of one row
        values = student.tensor(role, weight.layer)[None] if is_vector else student.rows(role, weight.layer, rows.rows)
        rows_RN = values.flatten(0, -2)  # a convolution's rows have a channel each
        return _Matrix(rows_RN, weights, weight.codes.name)

    def _factor(self, rows: _Rows, role: Role, importance_EN: torch.Tensor | None) -> _Matrix:
        """A base, all of them side by side, or a factor of an adapter; all experts on a base weigh its columns."""
        weight, layer, number = rows.weight, rows.weight.layer, rows.number
        assert layer is not None and number is not None
        name, bases = f"{weight.codes.name}[{number}]", self._student.spec.layers[layer].bases
        assert bases is not None, f"{name} stands on nothing"
        if not weight.form.is_adapter:
            numbers = weight.numbers if weight.form is Form.JOINED_BASES else (number,)
            values_RN = torch.cat([self._student.base(role, layer, base) for base in numbers], dim=1)
            members = [] if importance_EN is None else [importance_EN[list(bases.members(base))] for base in numbers]
            return _Matrix(values_RN, torch.cat([each.mean(0) for each in members]) if members else None, name)
        a_RI, b_OR = self._student.adapter(role, layer, number)
        if weight.form is Form.OUTPUTS:
            return _Matrix(b_OR.T.contiguous(), None, name)
        return _Matrix(a_RI, None if importance_EN is None else importance_EN[number], name)


def _encoded(values: Sequence[_Values], feedback: Feedback | None) -> list[Part]:
    return [part for of_weight in values for part in of_weight.encoded(feedback)]


def _encoded_expert(values: Sequence[_Values], expert: int, feedback: ExpertFeedback) -> list[Part]:
    """Encodes an expert: gate and up share their inputs; those of down are made from both, or from up alone."""
    matrices = {role: matrix for of_weight in values for role, matrix in of_weight.matrices.items()}
    gate_up = [of_weight for of_weight in values if Role.EXPERT_DOWN not in of_weight.matrices]
    (down,) = (of_weight for of_weight in values if Role.EXPERT_DOWN in of_weight.matrices)
    has_codes = any(of_weight.rows.has_codes for of_weight in gate_up)
    parts = _encoded(gate_up, feedback.gate_up(expert) if has_codes else None)
    if not down.rows.has_codes:
        return parts + down.encoded(None)
    of_inputs = (matrices[role].values_RN for role in (Role.EXPERT_GATE, Role.EXPERT_UP) if role in matrices)
    return parts + down.encoded(feedback.down(expert, *of_inputs))


def _blocks(matrix: _Matrix, encoding: Encoding, feedback: Feedback | None) -> IntegerBlocks:
    """Codes and scales from ggml's kernel if there is one, else from our search; uses feedback if given."""
    assert encoding.blocks is not None
    values_RN, importance_N, name = matrix.values_RN, matrix.importance_N, matrix.name
    bits, block_size, ggml_type = encoding.blocks.bits, encoding.blocks.block_size, encoding.ggml_type
    if ggml_type is not None:
        if feedback is None:
            rows_RY = quantize_rows(values_RN, ggml_type, importance_N, name=name)
        else:
            rows_RY = quantize_rows_with_feedback(values_RN, ggml_type, importance_N, feedback, name=name)
        return _UNPACKED[ggml_type](rows_RY)
    if feedback is None:
        return search_blocks(values_RN, bits, block_size, importance_N, name=name)
    return quantize_blocks_with_feedback(values_RN, bits, block_size, feedback, importance_N, name=name)


def _alternating(rows: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The first rows of all matrices, then the second, and so on."""
    return rows[0] if len(rows) == 1 else np.stack(rows, axis=1).reshape(-1, rows[0].shape[1])
