"""``make floors``: the changes that each runtime makes by itself, on both trained models. Writes ``results/floors.md``.

    python -m benchmarks.floors [--threads 1] [--chunks-per-file 4]

Each model is written whole, nothing compressed, in every type that the table names; torch then runs the numbers
that the files hold (validate/metrics/floors.py). F32 holds the original's own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressors.calibration.splits import BLOCK_LENGTH, tokenize_heldout
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.predictions.routing_record import RoutingRecord
from compressors.model.running.memory import MemoryLimit
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from exporter.hub import bundled_text, resolve_model
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from validate.metrics.evaluation import evaluate
from validate.metrics.floors import floor_figures
from validate.report import numbers
from validate.runtimes.backend import RuntimeBackend, scored_positions
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.runtimes.torch import TorchBackend

__all__ = ["Floor", "markdown", "measure"]

_RESULTS = Path(__file__).parent / "results" / "floors.md"
_COARSE = Path(__file__).parent.parent / "tests" / "fixtures" / "coarse"
_TYPES = {"F32": ("gguf", "onnx"), "Q8_0": ("gguf",), "Q4_0": ("gguf", "onnx")}
_MEMORY_BYTES = 4_000_000_000

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Floor:
    """One runtime with one type of weights."""

    model: str
    weight_type: str
    runtime: str
    figures: Mapping[str, Any]  # validate.metrics.floors.floor_figures


def measure(model: str, source: Source, tokens_BT: Tokens, folder: Path, threads: int) -> Iterator[Floor]:
    """Every type of a model, in every runtime that has it; all files of a type hold the same numbers."""
    student = Student.teacher(source)
    for weight_type, artifacts in _TYPES.items():
        path = folder / f"{weight_type}.gguf"
        write_gguf(student, weight_type, path, name=model, threads=threads)
        reference, routing = _by_torch(student.as_written(GgufWeights(path, student.spec)), tokens_BT, path)
        for artifact in artifacts:
            backend = _opener(artifact, student, weight_type, path, threads)()
            evaluation = evaluate(backend, tokens_BT, {"torch": reference})
            yield Floor(model, weight_type, backend.runtime, floor_figures(evaluation, "torch", routing))


def _by_torch(written: Student, tokens_BT: Tokens, path: Path) -> tuple[LogProbReader, RoutingRecord | None]:
    scored = scored_positions(tokens_BT.shape[1])
    log_probs = path.with_suffix(".log_probs")
    record = LogProbWriter(log_probs, len(tokens_BT) * (scored.stop - scored.start), written.spec.vocab_size)
    backend = TorchBackend(written, limit=MemoryLimit(_MEMORY_BYTES, path.parent / "spill"))
    evaluation = evaluate(backend, tokens_BT, {}, record=record)
    return LogProbReader(log_probs), evaluation.routing


def _opener(
    artifact: str, student: Student, weight_type: str, gguf: Path, threads: int
) -> Callable[[], RuntimeBackend]:
    if artifact == "gguf":
        return lambda: LlamaCppBackend(gguf, n_ctx=BLOCK_LENGTH, threads=threads)
    folder = gguf.with_suffix(".onnx")
    write_onnx(student, weight_type, folder, inputs="float32", threads=threads)
    return lambda: OnnxRuntimeBackend(folder, threads=threads)


def markdown(floors: list[Floor]) -> str:
    """The page."""
    n_chunks, n_tokens = floors[0].figures["chunks"], floors[0].figures["tokens"]
    lines = [
        "# What each runtime changes by itself",
        "",
        "Both trained models, nothing compressed: each file in its runtime beside the streamed torch reference, which "
        f"computes in float32 with the numbers that the file holds. {n_chunks} held-out chunks of 512 tokens, "
        f"{n_tokens:,} scored; divergence in nats, in brackets 95 % intervals by bootstrap over chunks. "
        "ONNX Runtime has float32 inputs at 4 bits. `make floors` writes this page.",
        "",
        "| model | type | runtime | perplexity | torch | change | mean divergence | median | 99.9 % | same top token "
        "| routing overlap |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(_line(floor) for floor in floors),
    ]
    return "\n".join(lines) + "\n"


def _line(floor: Floor) -> str:
    figures, kld, routing = floor.figures, floor.figures["kld"], floor.figures["routing"]
    cells = (
        *(floor.model, floor.weight_type, floor.runtime),
        *(f"{figures[key]:.4f}" for key in ("perplexity", "perplexity_torch")),
        f"{100 * (figures['perplexity_ratio'] - 1):+.4f} %",
        f"{kld['mean']:.1e} ({kld['mean_interval'][0]:.1e} to {kld['mean_interval'][1]:.1e})",
        *(f"{kld[key]:.1e}" for key in ("median", "p999")),
        numbers.percent(figures["top1_agreement"]),
        f"{numbers.percent(routing['overlap'])} ({numbers.interval(routing['overlap_interval'], numbers.percent)})",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures both models."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunks-per-file", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as the stages do
    floors: list[Floor] = []
    for model, path in (("fine", resolve_model(None, None, offline=True)), ("coarse", _COARSE)):
        _, blocks = tokenize_heldout(bundled_text("heldout"), path)
        tokens_BT = blocks.leading(arguments.chunks_per_file).tokens_BT.numpy()
        with tempfile.TemporaryDirectory() as folder:
            floors += measure(model, open_source(path), tokens_BT, Path(folder), arguments.threads)
    _RESULTS.write_text(markdown(floors), encoding="utf-8")


if __name__ == "__main__":
    main()
