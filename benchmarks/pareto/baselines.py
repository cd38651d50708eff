"""The baselines: llama-quantize's mixes of the whole model, and of the experts that REAP keeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.pareto.subject import Subject
from exporter.searching.curve import ParetoFiles

__all__ = ["MIXES", "PRESETS", "measure_presets", "measure_pruned"]

PRESETS = "llama-quantize"
"""The method of rows of the whole model."""

MIXES = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0", "Q3_K_M", "Q3_K_S", "IQ3_S", "IQ3_XXS"),
    *("Q2_K", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M"),
)
_MIXES_OF_PRUNED = ("Q6_K", "Q4_K_M", "Q2_K", "IQ2_XXS")
_PRUNED = (0.25, 0.5)  # shares of the experts that go
_RECOVERIES = {"none": "", "auto": ", recovered"}


def measure_presets(subject: Subject, mixes: Sequence[str] = MIXES) -> None:
    """Measures mixes of the whole model."""
    _measure_mixes(subject, PRESETS, subject.reference, mixes, "")


def measure_pruned(subject: Subject, files: ParetoFiles) -> None:
    """Measures mixes of what is left after REAP, with and without the recovery of an export."""
    for recovery, said in _RECOVERIES.items():
        for share in _PRUNED:
            method = f"REAP {share:.0%}{said}"
            if all(subject.rows.find(subject.name, method, mix) for mix in _MIXES_OF_PRUNED):
                continue
            n_experts = round((1 - share) * subject.spec.n_experts)
            source = subject.folder / f"reap-{n_experts}-{recovery}.gguf"
            if not source.exists():
                files.write_mix("F32", n_experts, recovery).rename(source)
            _measure_mixes(subject, method, source, _MIXES_OF_PRUNED, f"{n_experts} experts")
            source.unlink()


def _measure_mixes(subject: Subject, method: str, source: Path, mixes: Sequence[str], structure: str) -> None:
    """Quantizes an F32 file to every mix that has no row yet, and measures each."""
    for mix in mixes:
        subject.measure(method, mix, partial(subject.measuring.quantize, source, mix), structure=structure)
