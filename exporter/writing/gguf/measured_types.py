"""Measures the costs of each type of each tensor of a GGUF file, in bytes and divergence, for an allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from compressors.calibration.statistics import Importance
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.sources.student import Student
from compressors.sensitivity import Quantizer, TypeTable
from compressors.sensitivity.matrices import Sensitivities
from compressors.sensitivity.measuring import measured_table
from compressors.sensitivity.sampling import SAMPLED_WEIGHTS
from exporter.writing.gguf.type_table import ALLOCATED_TYPES, DecodeCost, plan_gguf_units

__all__ = ["gguf_type_table"]


def gguf_type_table(
    student: Student,
    sensitivities: Sensitivities,
    importance: Importance,
    types: Sequence[GGMLQuantizationType] = ALLOCATED_TYPES,
    *,
    feedback: bool = False,
    quantizers: Mapping[GGMLQuantizationType, Quantizer | None] | None = None,
    decode_cost: DecodeCost | None = None,
    n_weights: int | None = SAMPLED_WEIGHTS,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> TypeTable:
    """Measures the table of a student: every tensor in every type that fits its rows.

    The arguments are those of :func:`~exporter.writing.gguf.type_table.plan_gguf_units` and
    :func:`~compressors.sensitivity.measuring.measured_table`.
    """
    plans = plan_gguf_units(student.spec, types, feedback=feedback, quantizers=quantizers, decode_cost=decode_cost)
    return measured_table(
        student, plans, sensitivities, importance, n_weights=n_weights, threads=threads, progress=progress
    )
