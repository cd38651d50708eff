"""A file's weights beside those that it should hold: which tensors are damaged, and what they hold instead.

Each expert's projection, each row of a router and each other tensor is a unit. Quantization leaves a unit within a few
percent of what it should be; a unit that is further off than 80 % does not hold it. What it holds is found by a
signature, the values at 256 fixed places: those of unrelated tensors have a cosine near 0, those of a tensor and its
quantized copy near 1. So a mix-up is named without holding two models in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.families import Role
from compressors.model.student import Student

__all__ = ["Damage", "Unit", "WeightComparison", "compare_weights"]

_ANOTHER_TENSOR = 0.8  # relative error; an unrelated tensor's is at least 1, that of 2-bit types about 0.3
_RESEMBLES = 0.6  # cosine of signatures
_PLACES = 256
_ROWS_AT_ONCE = 4096  # of embedding and head


@dataclass(frozen=True)
class Unit:
    """Something that is compared by itself."""

    role: Role
    layer: int | None
    index: int | None  # the expert, or the router's row


@dataclass(frozen=True)
class Damage:
    """A unit that does not hold what it should."""

    unit: Unit
    relative_error: float
    is_zero: bool
    holds: Unit | None  # the original's unit that it resembles


@dataclass(frozen=True)
class WeightComparison:
    """Relative errors |found - expected| / |expected| of all units, and those that are damaged."""

    errors: Mapping[Unit, float]
    damage: tuple[Damage, ...]


def compare_weights(
    expected: Student, found: Student, *, with_vocabulary: bool = True, progress: Callable[[int], None] | None = None
) -> WeightComparison:
    """Compares two students of one shape, a tensor at a time.

    Args:
        expected: what the file should hold.
        found: what it holds (:meth:`~compressors.model.student.Student.as_written`).
        with_vocabulary: compare embedding and head too; not if they are of different sizes.
        progress: called with 1 after each layer.

    Raises:
        InputError: a file cannot be read.
    """
    comparison = _Comparison()
    for layer in [None, *range(expected.shape.n_layers)]:
        for role in expected.shape.stored_roles:
            if role.is_global == (layer is None) and (with_vocabulary or role not in _VOCABULARY_ROLES):
                _compare_tensor(comparison, expected, found, role, layer)
        if layer is not None and progress is not None:
            progress(1)
    return comparison.result()


_VOCABULARY_ROLES = (Role.TOKEN_EMBEDDING, Role.HEAD)


def _compare_tensor(comparison: _Comparison, expected: Student, found: Student, role: Role, layer: int | None) -> None:
    if layer is not None and role.is_expert:
        for expert in range(expected.shape.layer(layer).n_experts):
            values = [student.expert(role, layer, expert).float() for student in (expected, found)]
            comparison.add(Unit(role, layer, expert), iter([tuple(values)]))
    elif role in _VOCABULARY_ROLES:
        comparison.add(Unit(role, layer, None), _vocabulary_rows(expected, found, role))
    elif layer is None or role in expected.shape.layer_roles(layer):
        both = [student.tensor(role, layer).float() for student in (expected, found)]
        if role is Role.ROUTER:
            for row, pair in enumerate(zip(*both, strict=True)):
                comparison.add(Unit(role, layer, row), iter([pair]))
        else:
            comparison.add(Unit(role, layer, None), iter([tuple(both)]))


def _vocabulary_rows(expected: Student, found: Student, role: Role) -> Iterator[tuple[torch.Tensor, ...]]:
    for start in range(0, expected.shape.vocab_size, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, expected.shape.vocab_size))
        yield tuple(student.rows(role, None, rows).float() for student in (expected, found))


class _Comparison:
    """Errors and signatures of the units so far."""

    def __init__(self) -> None:
        self._errors: dict[Unit, float] = {}
        self._zeros: set[Unit] = set()
        self._expected: dict[Unit, npt.NDArray[np.float32]] = {}
        self._found: dict[Unit, npt.NDArray[np.float32]] = {}
        self._sizes: dict[Unit, int] = {}

    def add(self, unit: Unit, pieces: Iterator[tuple[torch.Tensor, ...]]) -> None:
        """A unit's expected and found values, in pieces; its signature is the first piece's."""
        squares, found_squares, error_squares = 0.0, 0.0, 0.0
        for expected, found in pieces:
            if unit not in self._expected:
                self._expected[unit], self._found[unit] = _signature(expected), _signature(found)
                self._sizes[unit] = expected.numel()
            squares += float(expected.square().sum())
            found_squares += float(found.square().sum())
            error_squares += float((found - expected).square_().sum())
        self._errors[unit] = (error_squares / squares) ** 0.5 if squares else float(found_squares > 0)
        if squares and not found_squares:
            self._zeros.add(unit)

    def result(self) -> WeightComparison:
        suspects = [unit for unit, error in self._errors.items() if not error <= _ANOTHER_TENSOR]
        by_size: dict[int, list[Unit]] = defaultdict(list)
        for unit, size in self._sizes.items() if suspects else ():
            by_size[size].append(unit)
        damage = []
        for unit in suspects:
            holds = None if unit in self._zeros else self._resembled(unit, by_size[self._sizes[unit]])
            damage.append(Damage(unit, self._errors[unit], unit in self._zeros, holds))
        return WeightComparison(self._errors, tuple(damage))

    def _resembled(self, unit: Unit, candidates: list[Unit]) -> Unit | None:
        signatures = np.stack([self._expected[candidate] for candidate in candidates])
        cosines = signatures @ self._found[unit]
        best = int(np.argmax(cosines))
        return candidates[best] if cosines[best] > _RESEMBLES else None


def _signature(values: torch.Tensor) -> npt.NDArray[np.float32]:
    """The values at fixed places, as a vector of length 1."""
    flat = values.reshape(-1).numpy()
    places = np.random.default_rng(len(flat)).integers(0, len(flat), _PLACES)
    sample: npt.NDArray[np.float32] = flat[places]
    length = float(np.linalg.norm(sample))
    return sample / np.float32(length) if np.isfinite(length) and length > 0 else np.zeros_like(sample)
