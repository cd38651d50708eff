"""The error of a quantized type, measured on few rows of a tensor.

Rows are chosen with a probability in proportion to the weight of their errors, by even steps through the running sum
("systematic sampling"; Madow, 1949), so the choice is the same in every run, every expert is represented by its share,
and every type is judged by the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compressors.calibration.statistics import Importance
from compressors.model.description.roles import Role
from compressors.model.sources.student import Student
from compressors.sensitivity.divergence import SecondOrder
from compressors.sensitivity.matrices import MatrixSensitivity
from compressors.sensitivity.quantizers import Quantizer

__all__ = ["SAMPLED_WEIGHTS", "RowSample", "sample_rows"]

SAMPLED_WEIGHTS = 1 << 16
"""Weights of a tensor that are quantized to judge a type, unless that is less than :data:`LEAST_ROWS` rows."""
LEAST_ROWS = 128


@dataclass(frozen=True)
class _Rows:
    """Some rows of one matrix."""

    name: str
    values_RN: torch.Tensor  # float32
    weights_RN: torch.Tensor  # weights of their squared errors, including the weight of rows left out
    routed_weights_RN: torch.Tensor  # the part of the weights for errors that routers see
    importance_N: torch.Tensor | None


@dataclass(frozen=True)
class RowSample:
    """Some rows of a tensor, which represent all."""

    parts: tuple[_Rows, ...]

    def second_order(self, quantize: Quantizer) -> SecondOrder:
        """The second-order divergence that quantizing the tensor alone would cause."""
        return sum((_second_order(part, quantize) for part in self.parts), SecondOrder(0.0, 0.0))


def _second_order(part: _Rows, quantize: Quantizer) -> SecondOrder:
    error_RN = (quantize(part.values_RN, part.importance_N, part.name) - part.values_RN).square()
    total, routed = (
        0.5 * float((weights_RN * error_RN).sum(dtype=torch.float64))
        for weights_RN in (part.weights_RN, part.routed_weights_RN)
    )
    return SecondOrder(total, routed)


def sample_rows(
    student: Student,
    role: Role,
    layer: int | None,
    sensitivity: MatrixSensitivity,
    importance: Importance,
    n_weights: int | None = SAMPLED_WEIGHTS,
) -> RowSample:
    """Reads rows of a tensor, or of all experts' tensors of a layer if the role is an expert's.

    Args:
        student: the model; a matrix without a chosen row is not read.
        role: the tensor's role.
        layer: the tensor's layer.
        sensitivity: the weights of the errors.
        importance: importance for the kernels, the same that the file is written with.
        n_weights: about how many weights to read; None: all.

    Raises:
        InputError: a weight cannot be read.
    """
    row_weights_MO = sensitivity.row_weights_MO
    row_length = sensitivity.columns_MPI.shape[-1]
    n_rows = None if n_weights is None else max(LEAST_ROWS, n_weights // row_length)
    counts_MO, scale_MO = _chosen(row_weights_MO, n_rows)
    parts = []
    for matrix, scale_O in enumerate(scale_MO):
        rows = counts_MO[matrix].nonzero()[:, 0]
        if not len(rows):
            continue
        values_RN = _matrix(student, role, layer, matrix)[rows].float()
        scale_R1 = scale_O[rows, None].float()
        weights_RN = sensitivity.weights(matrix, rows) * scale_R1
        routed_RN = weights_RN
        if not all(sensitivity.routed_P):
            routed_RN = sensitivity.weights(matrix, rows, routed_only=True) * scale_R1
        found = importance.get((role, layer))
        importance_N = found if found is None or not role.is_expert else found[matrix]
        parts.append(_Rows(student.name(role, layer, matrix), values_RN, weights_RN, routed_RN, importance_N))
    return RowSample(tuple(parts))


def _chosen(row_weights_MO: torch.Tensor, n_rows: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns how often each row is chosen, and the factor that scales its weights up to all rows."""
    if n_rows is None or n_rows >= row_weights_MO.numel():
        return (row_weights_MO > 0).long(), torch.ones_like(row_weights_MO)
    running = row_weights_MO.flatten().cumsum(0)
    step = running[-1] / n_rows
    places = torch.searchsorted(running, (torch.arange(n_rows, dtype=torch.float64) + 0.5) * step)
    counts = torch.bincount(places.clamp_max(running.numel() - 1), minlength=running.numel()).view_as(row_weights_MO)
    return counts, counts * step / row_weights_MO.clamp_min(torch.finfo(torch.float64).tiny)


def _matrix(student: Student, role: Role, layer: int | None, matrix: int) -> torch.Tensor:
    if role.is_expert:
        assert layer is not None
        return student.expert(role, layer, matrix)
    return student.tensor(role, layer)
