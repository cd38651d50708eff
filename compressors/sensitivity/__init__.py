"""Chooses a type for each tensor by the effect of its errors on the output, within a limit of bytes."""

from __future__ import annotations

from compressors.sensitivity.defaults import default_table
from compressors.sensitivity.divergence import DivergenceModel, SecondOrder
from compressors.sensitivity.feedback_factors import feedback_factor
from compressors.sensitivity.gathering import gather_sensitivities
from compressors.sensitivity.knapsack import Allocation, allocate, allocate_file, smallest_bytes
from compressors.sensitivity.matrices import MatrixSensitivity, Sensitivities, VocabularySensitivities
from compressors.sensitivity.sampling import Quantizer, ggml_quantizer
from compressors.sensitivity.table import Candidate, Option, TypeTable, Unit, UnitPlan, measured_table

__all__ = [
    "Allocation",
    "Candidate",
    "DivergenceModel",
    "MatrixSensitivity",
    "Option",
    "Quantizer",
    "SecondOrder",
    "Sensitivities",
    "TypeTable",
    "Unit",
    "UnitPlan",
    "VocabularySensitivities",
    "allocate",
    "allocate_file",
    "default_table",
    "feedback_factor",
    "gather_sensitivities",
    "ggml_quantizer",
    "measured_table",
    "smallest_bytes",
]
