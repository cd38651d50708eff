"""Chooses a type for each tensor by the effect of its errors on the output, within a limit of bytes.

Here is all that a plan needs; the modules that measure import torch.
"""

from __future__ import annotations

from compressors.sensitivity.defaults import default_table
from compressors.sensitivity.divergence import DivergenceModel, SecondOrder
from compressors.sensitivity.feedback_factors import feedback_factor
from compressors.sensitivity.knapsack import Allocation, allocate, allocate_file, smallest_bytes
from compressors.sensitivity.quantizers import Quantizer, ggml_quantizer
from compressors.sensitivity.table import Candidate, Option, TypeTable, Unit, UnitPlan

__all__ = [
    "Allocation",
    "Candidate",
    "DivergenceModel",
    "Option",
    "Quantizer",
    "SecondOrder",
    "TypeTable",
    "Unit",
    "UnitPlan",
    "allocate",
    "allocate_file",
    "default_table",
    "feedback_factor",
    "ggml_quantizer",
    "smallest_bytes",
]
