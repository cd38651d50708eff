"""The same curve for ONNX, measured by ONNX Runtime: the 4-bit preset, and ours from 1.1 times its bytes down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.pareto.subject import Subject
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from exporter.curve.rows import OURS, ParetoRow, RowFile
from exporter.searching.curve import ParetoFiles, described_structure
from exporter.writing.onnx.layout import plan_tensors
from exporter.writing.onnx.writer import predict_size
from validate.metrics.evaluation import evaluate
from validate.metrics.figures import fidelity_figures
from validate.runtimes.backend import scored_positions
from validate.runtimes.onnx import OnnxRuntimeBackend

__all__ = ["BARS", "PRESET", "measure_onnx"]

PRESET = "Q4_0"
BARS: Mapping[str, float] = {"1.0 x": 0.6, "1.1 x": 0.4}
"""Most of the preset's divergence, at so many times its bytes."""

_BITS = (4.0, 3.5, 3.0, 2.75, 2.5)  # of a weight, on average, scales included
_CHUNKS = 25


def measure_onnx(subject: Subject, files: ParetoFiles, heldout_BT: npt.NDArray[np.int64], rows: RowFile) -> None:
    """Measures what has no row yet.

    Args:
        subject: the model.
        files: makes its files.
        heldout_BT: chunks of held-out text; some of them are taken.
        rows: what was measured.
    """
    bench = _Bench(subject, heldout_BT[:: max(1, len(heldout_BT) // _CHUNKS)], rows)
    bench.record_original(files)
    bench.measure(PRESET, PRESET, lambda: files.write_mix(PRESET, artifact="onnx"))
    preset_bytes = predict_size(subject.spec, PRESET)
    sizes = {label: int(float(label.split()[0]) * preset_bytes) for label in BARS}
    sizes |= {f"{bits:g} bits": _bytes_at(bits, subject) for bits in _BITS}
    for label, n_bytes in sizes.items():
        if rows.find(subject.name, OURS, label) is None:
            found = files.best(n_bytes, "onnx")
            structure = described_structure(found.compress, subject.spec)
            bench.measure(OURS, label, lambda found=found: files.write(found), structure, found.predicted, n_bytes)


class _Bench:
    def __init__(self, subject: Subject, tokens_BT: npt.NDArray[np.int64], rows: RowFile) -> None:
        self._subject = subject
        self._tokens_BT = tokens_BT
        self._rows = rows
        self._original = subject.folder / "onnx-log-probs"

    def record_original(self, files: ParetoFiles) -> None:
        """Keeps what ONNX Runtime makes of the float32 file, unless it is there."""
        if self._original.exists():
            return
        partial = self._original.with_name("onnx-log-probs.partial")
        scored = scored_positions(self._tokens_BT.shape[1])
        n_scored = len(self._tokens_BT) * (scored.stop - scored.start)
        writer = LogProbWriter(partial, n_scored, self._subject.spec.vocab_size)
        backend = OnnxRuntimeBackend(files.write_mix("F32", artifact="onnx"), threads=self._subject.threads)
        evaluate(backend, self._tokens_BT, {}, record=writer)
        partial.rename(self._original)

    def measure(
        self,
        method: str,
        mix: str,
        write: Callable[[], Path],
        structure: str = "",
        predicted: float | None = None,
        budget: int | None = None,
    ) -> None:
        """Adds a row unless it is there."""
        subject = self._subject
        if self._rows.find(subject.name, method, mix) is not None:
            return
        folder = write()
        n_bytes = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
        backend = OnnxRuntimeBackend(folder, threads=subject.threads)
        evaluation = evaluate(backend, self._tokens_BT, {"F32": LogProbReader(self._original)})
        figures = fidelity_figures(evaluation, "F32")
        row = ParetoRow(
            subject.name,
            method,
            mix,
            n_bytes,
            n_bytes / (predict_size(subject.spec, "F32") / 2),
            figures["kld"]["mean"],
            figures["kld"]["mean_error"],
            figures["top1_agreement"],
            figures["perplexity"],
            structure,
            predicted,
            budget,
        )
        self._rows.add(row)
        print(f"{subject.name}, ONNX: {method}, {mix}: {n_bytes:,} bytes, {row.divergence:.5f} nats", flush=True)


def _bytes_at(bits: float, subject: Subject) -> int:
    """Bytes of a file whose matrices have so many bits for a weight."""
    weights = plan_tensors(subject.spec, PRESET).weights
    n_values = sum(math.prod(weight.shape) for weight in weights if weight.encoding.blocks is not None)
    rest = predict_size(subject.spec, "F32") - 4 * n_values
    return rest + int(bits * n_values / 8)
