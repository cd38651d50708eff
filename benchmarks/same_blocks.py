"""Compares the routing of the runtimes. Writes ``results/same_blocks.{csv,md}``.

    python -m benchmarks.same_blocks [--chunks 5] [--threads 1]

Both trained models, every expert kept, are written as GGUF and ONNX of types whose files hold the same numbers: Q4_0
(experts and linears in the same 4-bit blocks, embedding and head in Q8_0) and, as a control, F32. The routing of all
held-out tokens is compared between the runtimes, and with torch running the very numbers of the files; then every
router is given torch's own hidden states.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from compressors.calibration.splits import tokenize_heldout
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.predictions.routing_record import RoutingRecord
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from exporter.hub import bundled_text
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from validate.metrics.bootstrap import Interval
from validate.metrics.evaluation import evaluate
from validate.routing.agreement import routing_agreement
from validate.routing.router_alone import RouterInputRecorder, router_alone
from validate.routing.router_inputs import RouterInputs, spread_chunks
from validate.routing.ties import TIE_MARGIN, find_ties
from validate.runtimes.backend import RuntimeBackend
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.runtimes.torch import TorchBackend

_REPOSITORY = Path(__file__).parent.parent
_RESULTS = Path(__file__).parent / "results"
_MODELS = {"fine": _REPOSITORY / "exporter/demo/model", "coarse": _REPOSITORY / "tests/fixtures/coarse"}
_TYPES = ("F32", "Q4_0")
_HEADINGS = (
    "model",
    "type",
    "compared",
    "chunks",
    "overlap",
    "95 % interval",
    "exact set",
    "top expert",
    "weighted",
    "without ties",
    "ties among differing",
    "margin error",
)
_INTRODUCTION = (
    "# The same numbers in both runtimes: do they route alike?",
    "",
    "Both trained models with all their experts, as GGUF and ONNX files that hold the same numbers: Q4_0 (experts and",
    'linears in the same 4-bit blocks) and, as a control, F32. "torch" runs the numbers of the files in float32.',
    '"Routers alone": every router is given torch\'s hidden states. Written by `python -m benchmarks.same_blocks`.',
    "",
    "Overlap is the mean share of a token's experts that both chose, with its 95 % interval (block bootstrap over",
    "chunks of 512 tokens). A token is a tie where the router logits of the last expert that was chosen and of the",
    f"next differ by less than {TIE_MARGIN:g}. Margin error: the most that the runtime's arithmetic moves that",
    "difference on equal inputs. llama.cpp keeps keys and values in F16 and rounds the inputs of 4-bit products to 8",
    "bits; ONNX Runtime, asked for float32 inputs, rounds only those of the output head.",
    "",
)
_LLAMA_CPP, _ONNX_RUNTIME, _TORCH = "llama.cpp", "ONNX Runtime", "torch"


@dataclass(frozen=True)
class Compared:
    """Two routings of the same tokens by the same numbers."""

    model: str
    type: str
    comparison: str
    chunks: int
    overlap: float
    low: float | None
    high: float | None
    exact: float
    top1: float
    weighted: float
    overlap_without_ties: float | None
    differing_tied: float | None
    margin_error: float | None  # of routers alone


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=5, help="chunks of 512 tokens of each of the five domains")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found: list[Compared] = []
    for name, source in _MODELS.items():
        _, split = tokenize_heldout(bundled_text("heldout"), source)
        tokens_BT = split.leading(options.chunks).tokens_BT.numpy()
        for preset in _TYPES:
            with tempfile.TemporaryDirectory() as folder:
                for compared in compare(name, open_source(source), preset, tokens_BT, Path(folder), options.threads):
                    print(compared)
                    found.append(compared)
    with (_RESULTS / "same_blocks.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Compared)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in asdict(compared).items()} for compared in found)
    (_RESULTS / "same_blocks.md").write_text(page(found), encoding="utf-8")


def types_of_onnx(spec: ModelSpec, preset: str) -> dict[str, str]:
    """Types for GGUF whose numbers are those of our ONNX files, where llama.cpp's mix has others."""
    if preset != "Q4_0":
        return {}
    embeddings = (Role.TOKEN_EMBEDDING, Role.HEAD)
    matrices = (tensor for tensor in plan_tensors(spec, preset) if tensor.is_matrix)
    return {tensor.name: "Q8_0" if tensor.role in embeddings else "Q4_0" for tensor in matrices}


def compare(
    name: str, source: Source, preset: str, tokens_BT: npt.NDArray[np.int64], folder: Path, threads: int
) -> Iterator[Compared]:
    """Every comparison of one model's two files.

    Args:
        name: the model's name, for the table.
        source: the checkpoint; all its experts are kept.
        preset: a type whose files hold the same numbers.
        tokens_BT: held-out chunks.
        folder: an empty one for the files.
        threads: the number of threads of the runtimes.
    """
    student = Student.teacher(source)
    types = types_of_onnx(student.spec, preset)
    write_gguf(student, preset, folder / "x.gguf", types=types, name="x", threads=threads)
    write_onnx(student, preset, folder / "onnx", inputs="float32", threads=threads)
    written = student.as_written(GgufWeights(folder / "x.gguf", student.spec))
    sample_B = spread_chunks(len(tokens_BT))
    recorder = RouterInputRecorder(folder / "inputs", student.spec, sample_B, tokens_BT.shape[1])
    in_torch = _routing(TorchBackend(written, observers=[recorder.observe]), tokens_BT)
    recorder.finish(in_torch)
    runtimes: dict[str, RuntimeBackend] = {
        _LLAMA_CPP: LlamaCppBackend(folder / "x.gguf", n_ctx=tokens_BT.shape[1], threads=threads),
        _ONNX_RUNTIME: OnnxRuntimeBackend(folder / "onnx", threads=threads),
    }
    routings = {runtime: _routing(backend, tokens_BT) for runtime, backend in runtimes.items()}
    pairs = [(_LLAMA_CPP, routings[_LLAMA_CPP], _ONNX_RUNTIME)]
    pairs += [(_TORCH, in_torch, runtime) for runtime in runtimes]
    for first, reference, second in pairs:
        comparison = f"{second} and {first}"
        yield _compared(name, preset, comparison, reference, routings[second], len(tokens_BT))
    inputs = RouterInputs(folder / "inputs")
    for runtime, backend in runtimes.items():
        chosen = backend.route(tokens_BT[sample_B], inputs)
        error = router_alone(inputs, chosen).margin_error
        comparison = f"{runtime} and torch, routers alone"
        yield _compared(name, preset, comparison, inputs.routing(), chosen, len(sample_B), error)


def _routing(backend: RuntimeBackend | TorchBackend, tokens_BT: npt.NDArray[np.int64]) -> RoutingRecord:
    routing = evaluate(backend, tokens_BT, {}).routing
    assert routing is not None, "both models have experts"
    return routing


def _compared(
    name: str,
    preset: str,
    what: str,
    reference: RoutingRecord,
    model: RoutingRecord,
    n_chunks: int,
    error: float | None = None,
) -> Compared:
    agreement = routing_agreement(reference, model, n_chunks=n_chunks)
    ties = find_ties(reference, model)
    assert ties is not None, "every backend records margins"
    low, high = agreement.overlap_interval or (None, None)
    means = {figure: agreement.mean(figure) for figure in ("overlap", "exact", "top1", "weighted")}
    tied = {"overlap_without_ties": ties.overlap_without_ties, "differing_tied": ties.differing_tied}
    return Compared(name, preset, what, n_chunks, low=low, high=high, **means, **tied, margin_error=error)


def _cell(value: str | int | float | None) -> str | int:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def page(found: Sequence[Compared]) -> str:
    """The table."""
    lines = [*_INTRODUCTION, f"| {' | '.join(_HEADINGS)} |", "|---" * len(_HEADINGS) + "|"]
    for row in found:
        interval: Interval | None = None if row.low is None or row.high is None else (row.low, row.high)
        figures = [row.overlap, interval, row.exact, row.top1, row.weighted, row.overlap_without_ties]
        cells = [row.model, row.type, row.comparison, str(row.chunks), *map(_percent, figures)]
        cells += [_percent(row.differing_tied), "" if row.margin_error is None else f"{row.margin_error:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(value: float | Interval | None) -> str:
    if isinstance(value, tuple):
        return " to ".join(f"{100 * end:.3f}" for end in value)
    return "" if value is None else f"{100 * value:.3f} %"


if __name__ == "__main__":
    main()
