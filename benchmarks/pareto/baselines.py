"""The baselines: llama-quantize's mixes of the whole model, and of the experts that REAP keeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.pareto.subject import Subject

__all__ = ["MIXES", "MIXES_OF_PRUNED", "PRESETS", "measure_mixes"]

PRESETS = "llama-quantize"
"""The method of rows of the whole model."""

MIXES = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0", "Q3_K_M", "Q3_K_S", "IQ3_S", "IQ3_XXS"),
    *("Q2_K", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M"),
)
MIXES_OF_PRUNED = ("Q6_K", "Q4_K_M", "Q2_K", "IQ2_XXS")


def measure_mixes(subject: Subject, method: str, source: Path, mixes: Sequence[str], structure: str = "") -> None:
    """Quantizes an F32 file to every mix that has no row yet, and measures each."""
    for mix in mixes:
        subject.measure(method, mix, partial(subject.measuring.quantize, source, mix), structure)
