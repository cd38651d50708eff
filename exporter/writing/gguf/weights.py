"""A GGUF file's weights, piece by piece: how a piece is read and quantized, and where its bytes go.

A piece is an expert's matrix, or a slice of another one. With error feedback the three matrices of an expert are one
piece, since gate and up share their inputs and those of down are made from both; they lie in three places of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch

from compressors.calibration.statistics import Importance
from compressors.model.description.roles import Role
from compressors.model.sources.student import Student
from compressors.quantize import row_bytes
from compressors.quantize.feedback import TYPES_WITH_FEEDBACK, Feedback, quantize_rows_with_feedback
from compressors.quantize.kernels import quantize_rows
from exporter.writing.feedback import ExpertFeedback, StudentFeedback
from exporter.writing.gguf.container import aligned
from exporter.writing.gguf.layout import PlannedTensor
from exporter.writing.pieces import Piece, last_of_layers, row_slices, whole_experts
from exporter.writing.resumable import Part

__all__ = ["weight_pieces"]


def weight_pieces(
    student: Student,
    tensors: Sequence[PlannedTensor],
    offset: int,
    importance: Importance,
    feedback: StudentFeedback | None,
) -> Iterator[Piece]:
    """Yields all weights of a file; without feedback, in the file's order.

    Args:
        student: the source of the values.
        tensors: the tensors in the file's order.
        offset: the offset of the first tensor.
        importance: weighs quantization errors.
        feedback: chooses the codes of types with a choice of codes; None leaves all to the kernels.
    """
    matrices = _Matrices(student, importance, feedback)
    all_rows = _plan_rows(student, tensors, offset)
    groups = [(rows,) for rows in all_rows] if feedback is None else list(whole_experts(all_rows))
    layers = {} if feedback is None else last_of_layers(groups)
    end = offset
    for number, group in enumerate(groups):
        end = max(end, *(rows.offset + rows.n_bytes for rows in group))
        then = feedback.release(layers[number]) if feedback is not None and number in layers else None
        n_bytes, first = sum(rows.n_bytes for rows in group), group[0]
        yield Piece(n_bytes, end, partial(matrices.read, group), then, first.layer, first.is_head)


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of one matrix, and where the file holds them. A norm is a matrix of one row."""

    tensor: PlannedTensor
    expert: int | None
    rows: slice
    offset: int
    padding: int  # zeros after them; only a tensor's last rows have some

    @property
    def layer(self) -> int | None:
        """The decoder layer; None outside of the layers."""
        return self.tensor.layer

    @property
    def is_head(self) -> bool:
        """True for the head, unless it is the embedding."""
        return self.tensor.role is Role.HEAD

    @property
    def n_bytes(self) -> int:
        """Their bytes in the file, padding included."""
        n_rows: int = self.rows.stop - self.rows.start
        return n_rows * row_bytes(self.tensor.ggml_type, self.tensor.row_length) + self.padding


@dataclass(frozen=True)
class _Matrix:
    """Rows with their values, in storage dtype."""

    rows: _Rows
    values_RN: torch.Tensor
    importance_N: torch.Tensor | None
    name: str
    stored_RY: torch.Tensor | None = None  # the rows in their final form, where the source has that

    @property
    def has_codes_to_choose(self) -> bool:
        """True if error feedback can choose codes of their type, and the source has none yet."""
        return self.stored_RY is None and self.rows.tensor.ggml_type in TYPES_WITH_FEEDBACK

    def quantized(self, feedback: Feedback | None) -> list[Part]:
        """The quantized rows and their padding, each with its offset in the file."""
        ggml_type = self.rows.tensor.ggml_type
        if self.stored_RY is not None:
            quantized_RY = self.stored_RY.contiguous().numpy()
        elif feedback is None or not self.has_codes_to_choose:
            quantized_RY = quantize_rows(self.values_RN, ggml_type, self.importance_N, name=self.name)
        else:
            quantized_RY = quantize_rows_with_feedback(
                self.values_RN, ggml_type, self.importance_N, feedback, name=self.name
            )
        data = quantized_RY.data
        return [(self.rows.offset, data), (self.rows.offset + data.nbytes, memoryview(bytes(self.rows.padding)))]


def _plan_rows(student: Student, tensors: Sequence[PlannedTensor], offset: int) -> Iterator[_Rows]:
    """Everything after the header, in the file's order: whole experts, and slices of other matrices."""
    for tensor in tensors:
        n_rows, padding = prod(tensor.shape[:-1]), aligned(tensor.n_bytes) - tensor.n_bytes
        slices = _experts_rows(tensor, n_rows) if tensor.n_experts else _row_slices(student, tensor, n_rows)
        for number, rows in enumerate(slices):
            expert = number if tensor.n_experts else None
            at = offset + rows.start * row_bytes(tensor.ggml_type, tensor.row_length)
            yield _Rows(tensor, expert, rows, at, padding if rows.stop == n_rows else 0)
        offset += aligned(tensor.n_bytes)


def _experts_rows(tensor: PlannedTensor, n_rows: int) -> list[slice]:
    step = n_rows // tensor.n_experts
    return [slice(first, first + step) for first in range(0, n_rows, step)]


def _row_slices(student: Student, tensor: PlannedTensor, n_rows: int) -> list[slice]:
    """Slices of rows that are read together: all rows, unless rows of the file are rows of the student."""
    together = tensor.transform.rows_together(_sizes(student, tensor))
    if together is None or len(tensor.shape) == 1:
        return [slice(0, n_rows)]
    return row_slices(n_rows, tensor.row_length, multiple=together)


def _sizes(student: Student, tensor: PlannedTensor) -> Mapping[str, int]:
    """The sizes of the tensor's layer by letter."""
    return {} if tensor.layer is None else student.spec.blocks[tensor.layer].sizes


class _Matrices:
    """Reads a student's matrices, and returns functions that quantize them."""

    def __init__(self, student: Student, importance: Importance, feedback: StudentFeedback | None) -> None:
        self._student = student
        self._importance = importance
        self._feedback = feedback

    def read(self, group: tuple[_Rows, ...]) -> Callable[[], list[Part]]:
        """Reads rows of one matrix, or of one expert's three; the function that it returns quantizes them."""
        matrices = [self._matrix(rows) for rows in group]
        role, layer = group[0].tensor.role, group[0].tensor.layer
        is_behind = layer is not None and layer >= self._student.spec.n_layers  # its inputs are not kept
        if self._feedback is None or is_behind or not any(matrix.has_codes_to_choose for matrix in matrices):
            return partial(_quantized, matrices, None)
        if group[0].expert is not None:
            assert layer is not None
            return partial(_quantized_expert, matrices, self._feedback.experts(layer))
        feedback = self._feedback.matrix(role, layer) if group[0].tensor.transform.keeps_inputs else None
        return partial(_quantized, matrices, feedback)

    def _matrix(self, rows: _Rows) -> _Matrix:
        tensor, student = rows.tensor, self._student
        if tensor.values is not None:
            return _Matrix(rows, torch.tensor(tensor.values)[None], None, tensor.name)
        weights, sizes = self._importance.get((tensor.role, tensor.layer)), _sizes(student, tensor)
        if rows.expert is None:
            values = _source_rows(student, tensor, rows.rows)
        else:
            assert tensor.layer is not None
            values = student.expert(tensor.role, tensor.layer, rows.expert)
            weights = None if weights is None else weights[rows.expert]
        values_RN = tensor.transform.write(values, sizes).reshape(-1, tensor.row_length)
        weights = None if weights is None else tensor.transform.inputs(weights, sizes)
        name = student.name(tensor.role, tensor.layer, rows.expert)
        return _Matrix(rows, values_RN, weights, name, _stored_rows(student, rows))


def _stored_rows(student: Student, rows: _Rows) -> torch.Tensor | None:
    """The rows as the source has them, where they are unchanged and written in its type."""
    tensor = rows.tensor
    types = student.stored_types(tensor.role, tensor.layer, rows.expert) if tensor.is_matrix else ()
    if tensor.part >= len(types) or types[tensor.part] is not tensor.ggml_type:
        return None
    wanted = rows.rows if rows.expert is None else slice(None)
    return student.stored_rows(tensor.role, tensor.layer, tensor.part, wanted, rows.expert)


def _source_rows(student: Student, tensor: PlannedTensor, rows: slice) -> torch.Tensor:
    """The values that some rows of the file are made from, in storage dtype."""
    if tensor.transform.rows_together(_sizes(student, tensor)) is None or len(tensor.shape) == 1:
        return student.tensor(tensor.role, tensor.layer)
    return student.rows(tensor.role, tensor.layer, rows)


def _quantized(matrices: Sequence[_Matrix], feedback: Feedback | None) -> list[Part]:
    return [part for matrix in matrices for part in matrix.quantized(feedback)]


def _quantized_expert(matrices: Sequence[_Matrix], feedback: ExpertFeedback) -> list[Part]:
    """Quantizes an expert: gate and up share their inputs; those of down are made from both, or from up alone."""
    by_role = {matrix.rows.tensor.role: matrix for matrix in matrices}
    down = by_role.pop(Role.EXPERT_DOWN)
    of_inputs = [by_role.pop(role) for role in (Role.EXPERT_GATE, Role.EXPERT_UP) if role in by_role]
    expert = down.rows.expert
    assert expert is not None
    parts = _quantized(list(by_role.values()), None)
    has_codes = any(matrix.has_codes_to_choose for matrix in of_inputs)
    parts += _quantized(of_inputs, feedback.gate_up(expert) if has_codes else None)
    if down.has_codes_to_choose:
        return parts + down.quantized(feedback.down(expert, *(matrix.values_RN for matrix in of_inputs)))
    return parts + down.quantized(None)
