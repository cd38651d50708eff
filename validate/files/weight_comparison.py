"""Compares a file's weights with those that it should hold: finds damaged tensors, and their actual content.

Each expert's projection, each row of a router and each other tensor is a unit; where only some rows of a unit are
damaged, those are named. :mod:`validate.files.quantization_error` decides how far a unit may be off. If a unit is
further off than 80 %, its content is identified by a signature, the values at 256 fixed places: signatures of unrelated
tensors have a cosine near 0, those of a tensor and its quantized copy near 1. So a mix-up is named without holding two
models in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.description.spec import Place
from compressors.model.description.tensors import Kind, TensorSpec
from compressors.model.sources.student import Student
from compressors.model.sources.weights import StoredType
from validate.files.quantization_error import MatrixError

__all__ = ["Damage", "Fault", "TypeOf", "Unit", "WeightComparison", "compare_weights"]

_ANOTHER_TENSOR = 0.8  # relative error; an unrelated tensor has at least 1, a 2-bit type about 0.3
_RESEMBLES = 0.6  # cosine of signatures, and of rows
_PLACES = 256
_ROWS_AT_ONCE = 4096  # rows of embedding and head
_SAME_SIZE = 1e-3  # deviation of a coefficient that counts as none
_MORE = 2.0  # an error up to this many times the type's is not a second fault

TypeOf = Callable[[Role, int | None, int], StoredType]
"""(role, layer, part) -> the type in which a file stores the tensors of that role in that layer, or a part of one."""


@dataclass(frozen=True)
class Unit:
    """A part of the weights that is compared by itself."""

    role: Role
    layer: int | None
    index: int | None  # the expert, or the router's row
    row: int | None = None  # None: all rows
    part: int | None = None  # of a tensor that files hold in several parts


class Fault(Enum):
    """The kinds of fault that a unit can have."""

    ZERO = auto()
    HOLDS_ANOTHER = auto()  # it holds another unit or row of the original
    UNLIKE = auto()  # it resembles nothing of the original
    TOO_FAR = auto()  # it is further off than its type explains
    SCALED = auto()
    CHANGED = auto()  # it is stored in float and yet not equal


@dataclass(frozen=True)
class Damage:
    """A unit with wrong values."""

    unit: Unit
    fault: Fault
    relative_error: float
    usual_error: float = 0.0  # the error of its type
    type_name: str = ""
    scale: float = 1.0
    holds: Unit | None = None  # the original's unit that it resembles


@dataclass(frozen=True)
class WeightComparison:
    """Relative errors |found - expected| / |expected| of all units, and the damaged ones."""

    errors: Mapping[Unit, float]
    damage: tuple[Damage, ...]
    matrices: frozenset[Place]  # the tensors that files may quantize


def compare_weights(
    expected: Student,
    found: Student,
    stored_type: TypeOf,
    *,
    n_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> WeightComparison:
    """Compares two students of one description, a tensor at a time.

    Args:
        expected: the student that the file should hold.
        found: the student that it holds (:meth:`~compressors.model.sources.student.Student.as_written`).
        stored_type: gives the type of each tensor in the file.
        n_tokens: the number of rows of embedding and head that are compared; None: all.
        progress: called with 1 after each layer.

    Raises:
        InputError: a file cannot be read.
    """
    comparison = _Comparison()
    written = expected.spec.written
    for tensor in written.tensors:
        comparison.add_tensor(tensor, None, stored_type, _rows(expected, found, tensor, n_tokens))
    for index, layer in enumerate(written.blocks):
        for tensor in layer.tensors:
            comparison.add_tensor(tensor, index, stored_type, _units(expected, found, tensor, index))
        if progress is not None:
            progress(1)
    return comparison.result()


_Pieces = Iterable[tuple[torch.Tensor, torch.Tensor]]  # expected and found rows, float32
_Units = Iterable[tuple[Unit, _Pieces]]


def _rows(expected: Student, found: Student, tensor: TensorSpec, n_tokens: int | None) -> _Units:
    """The only unit of a tensor outside of the layers."""
    if tensor.kind is Kind.TABLE:
        n_rows = n_tokens or expected.spec.vocab_size
        return [(Unit(tensor.role, None, None), _vocabulary_rows(expected, found, tensor.role, n_rows))]
    return _units(expected, found, tensor, None)


def _units(expected: Student, found: Student, tensor: TensorSpec, layer: int | None) -> _Units:
    role = tensor.role
    if layer is not None and expected.spec.tensor(role, layer).is_per_expert:
        for expert in range(expected.spec.blocks[layer].n_experts):
            values = (_expert(expected, role, layer, expert), found.expert(role, layer, expert).float())
            yield Unit(role, layer, expert), [_matrices(*values)]
        return
    wanted, its = expected.tensor(role, layer).float(), found.tensor(role, layer).float()
    if not tensor.is_quantizable and not torch.equal(wanted, its):
        wanted = _as_stored(wanted, tensor, expected, layer)
    if tensor.kind is Kind.ROUTER and len(tensor.shape) > 1:
        for row, (one, other) in enumerate(zip(wanted, its, strict=True)):
            yield Unit(role, layer, row), [(one.reshape(1, -1), other.reshape(1, -1))]  # a bias has one value in a row
    elif tensor.is_quantizable and len(tensor.gguf_parts) > 1:
        yield from _parts(wanted, its, tensor, expected, layer)
    else:
        yield Unit(role, layer, None), [_matrices(wanted, its)]


def _expert(student: Student, role: Role, layer: int, expert: int) -> torch.Tensor:
    """An expert's matrix in float32; one that stands on a base is not rounded to the student's type, as in files."""
    bases = student.shared(layer)
    base = None if bases is None else bases.base_of[expert]
    if base is None:
        return student.expert(role, layer, expert).float()
    a_RI, b_OR = (factor.float().contiguous() for factor in student.adapter(role, layer, expert))
    product_OI = b_OR @ a_RI
    return product_OI if base == SharedBases.ZERO else student.base(role, layer, base).float() + product_OI


def _parts(wanted: torch.Tensor, its: torch.Tensor, tensor: TensorSpec, student: Student, layer: int | None) -> _Units:
    """The parts of a tensor as files hold them, each of which may have a type of its own."""
    sizes = {} if layer is None else student.spec.blocks[layer].sizes
    for number, part in enumerate(tensor.gguf_parts):
        values = (part.transform.write(wanted, sizes), part.transform.write(its, sizes))
        yield Unit(tensor.role, layer, None, part=number), [_matrices(*values)]


def _matrices(wanted: torch.Tensor, its: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    width = wanted.shape[-1]
    return wanted.reshape(-1, width), its.reshape(-1, width)


def _as_stored(wanted: torch.Tensor, tensor: TensorSpec, student: Student, layer: int | None) -> torch.Tensor:
    """The values that a GGUF file returns: a function that was applied to them may round, as may its inverse."""
    sizes = {} if layer is None else student.spec.blocks[layer].sizes
    stored = torch.empty_like(wanted)
    for part in tensor.gguf_parts:
        part.transform.read(part.transform.write(wanted, sizes), stored, sizes)
    return stored


def _vocabulary_rows(expected: Student, found: Student, role: Role, n_tokens: int) -> _Pieces:
    for start in range(0, n_tokens, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, n_tokens))
        yield expected.rows(role, None, rows).float(), found.rows(role, None, rows).float()


class _Comparison:
    """Errors and signatures of the units so far."""

    def __init__(self) -> None:
        self._errors: dict[Unit, float] = {}
        self._suspects: dict[Unit, MatrixError] = {}
        self._damage: list[Damage] = []
        self._expected: dict[Unit, npt.NDArray[np.float32]] = {}
        self._found: dict[Unit, npt.NDArray[np.float32]] = {}
        self._sizes: dict[Unit, int] = {}
        self._matrices: set[Place] = set()

    def add_tensor(self, tensor: TensorSpec, layer: int | None, stored_type: TypeOf, units: _Units) -> None:
        """Adds the units of one tensor."""
        if tensor.is_quantizable:
            self._matrices.add((tensor.role, layer))
        for unit, pieces in units:
            self.add(unit, stored_type(tensor.role, layer, unit.part or 0), pieces)

    def add(self, unit: Unit, stored_type: StoredType, pieces: _Pieces) -> None:
        """Adds a unit's expected and found values, in pieces; the first piece gives its signature."""
        matrix = MatrixError(stored_type)
        of_rows: list[Damage] = []
        n_rows = 0
        for expected, found in pieces:
            if unit not in self._expected:
                self._expected[unit], self._found[unit] = _signature(expected), _signature(found)
                self._sizes[unit] = expected.numel()
            damaged = matrix.add(expected, found)
            of_rows += [_row_damage(unit, matrix, expected, found, row, n_rows) for row in damaged]
            n_rows += len(expected)
        self._errors[unit] = matrix.relative_error
        if not (of_rows or matrix.is_too_far or matrix.is_scaled):
            return  # as near as its type allows, which for ternary types is not near
        if of_rows and n_rows > 1 and not matrix.is_mostly_damaged:
            self._damage += of_rows
        elif not matrix.relative_error <= _ANOTHER_TENSOR:
            self._suspects[unit] = matrix
        else:
            self._damage.append(_whole_damage(unit, matrix))

    def result(self) -> WeightComparison:
        by_size: dict[int, list[Unit]] = defaultdict(list)
        for unit, size in self._sizes.items() if self._suspects else ():
            by_size[size].append(unit)
        damage = [self._other(unit, matrix, by_size) for unit, matrix in self._suspects.items()]
        return WeightComparison(self._errors, (*damage, *self._damage), frozenset(self._matrices))

    def _other(self, unit: Unit, matrix: MatrixError, by_size: Mapping[int, list[Unit]]) -> Damage:
        if matrix.is_zero:
            return Damage(unit, Fault.ZERO, matrix.relative_error)
        holds = self._resembled(unit, by_size[self._sizes[unit]])
        if holds == unit:  # it resembles itself, and yet is far off
            return _whole_damage(unit, matrix)
        return Damage(unit, Fault.UNLIKE if holds is None else Fault.HOLDS_ANOTHER, matrix.relative_error, holds=holds)

    def _resembled(self, unit: Unit, candidates: list[Unit]) -> Unit | None:
        signatures = np.stack([self._expected[candidate] for candidate in candidates])
        cosines = signatures @ self._found[unit]
        best = int(np.argmax(cosines))
        return candidates[best] if cosines[best] > _RESEMBLES else None


def _whole_damage(unit: Unit, matrix: MatrixError) -> Damage:
    fault = Fault.CHANGED if matrix.is_float else Fault.TOO_FAR
    if _is_only_scaled(matrix.scale, matrix.relative_error, matrix.usual_error):
        fault = Fault.SCALED
    return Damage(unit, fault, matrix.relative_error, matrix.usual_error, matrix.type_name, matrix.scale)


def _is_only_scaled(scale: float, relative_error: float, usual_error: float) -> bool:
    """True if a change of size explains the error: the rest is at most about twice the type's own."""
    deviation = abs(scale - 1)
    left = max(relative_error**2 - deviation**2, 0.0) ** 0.5
    return deviation > _SAME_SIZE and left <= _MORE * usual_error + 0.01 * deviation


def _row_damage(
    unit: Unit, matrix: MatrixError, expected: torch.Tensor, found: torch.Tensor, row: int, before: int
) -> Damage:
    """Describes the damage of one row of a piece that begins at row ``before`` of its matrix."""
    its, wanted = found[row], expected[row]
    place = replace(unit, row=before + row)
    size = float(wanted.norm())
    relative = float((its - wanted).norm()) / size if size else float("inf")
    scale = float(its @ wanted) / size**2 if size else 1.0
    entry = Damage(place, Fault.TOO_FAR, relative, matrix.usual_error, matrix.type_name, scale)
    if not its.any():
        return replace(entry, fault=Fault.ZERO)
    if not relative <= _ANOTHER_TENSOR:
        cosines = expected @ its / (expected.norm(dim=1) * its.norm()).clamp_min(torch.finfo(torch.float32).tiny)
        best = int(cosines.argmax())
        if best != row and cosines[best] > _RESEMBLES:
            return replace(entry, fault=Fault.HOLDS_ANOTHER, holds=replace(unit, row=before + best))
        return replace(entry, fault=Fault.UNLIKE)
    if _is_only_scaled(scale, relative, matrix.usual_error):
        return replace(entry, fault=Fault.SCALED)
    return replace(entry, fault=Fault.CHANGED if matrix.is_float else Fault.TOO_FAR)


def _signature(values: torch.Tensor) -> npt.NDArray[np.float32]:
    """The values at fixed places, as a vector of length 1."""
    flat = values.reshape(-1).numpy()
    places = np.random.default_rng(len(flat)).integers(0, len(flat), _PLACES)
    sample: npt.NDArray[np.float32] = flat[places]
    length = float(np.linalg.norm(sample))
    return sample / np.float32(length) if np.isfinite(length) and length > 0 else np.zeros_like(sample)
