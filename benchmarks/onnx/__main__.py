"""Measures our ONNX files beside llama.cpp and torch on published shapes; writes ``results/onnx.{csv,md}``.

    python -m benchmarks.onnx [--model olmoe] [--bits 4]

Rows of the shapes and bits that are measured take the place of those that are there; ratios are those of one run.

Six layers of each shape, random weights, one thread. Files of as many bits answer the same prompts in turns in one
process, and each is measured once more in a process of its own for its memory. llama.cpp runs as its users run it.
"""

from __future__ import annotations

import csv
import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import click
import numpy as np
import onnxruntime
import torch

from benchmarks.onnx.files import (
    FORMATS,
    LAYERS,
    Format,
    Written,
    shaped_checkpoint,
    write_gguf_file,
    write_onnx_folder,
)
from benchmarks.onnx.other_exporters import (
    OtherOnnx,
    can_export,
    known_to_optimum,
    write_by_optimum,
    write_by_transformers,
)
from benchmarks.onnx.sides import LlamaCpp, OnnxRuntime, Side, Times, TorchEager, measure
from benchmarks.scale.checkpoints import MODELS
from compressors.model import quiet_libraries as quiet_libraries
from validate.runtimes.measure import measure_artifact

__all__ = ["Row", "page"]

_RESULTS = Path(__file__).parents[1] / "results"
_CSV = _RESULTS / "onnx.csv"
_EXPERTS, _ROUNDS, _PROMPT, _STEPS, _CONTEXT, _TOKENS = 16, 3, 128, 24, 512, 4096
_MOST_STEP, _MOST_PROMPT = 1.3, 1.5
"""The most time for a token, and for a prompt, in units of llama.cpp's at 4 bits."""
_LLAMA_CPP = "llama.cpp"
_EXPORTER, _OPTIMUM = "ONNX Runtime, transformers' graph", "ONNX Runtime, optimum's graph"
_LEAST_OPTIMUM = 5.0
"""The least time of optimum's graph for a token, in units of that of ours at 4 bits."""


_LIMITS = (
    "The head of 151,936 tokens limits a token. By ONNX Runtime's profiler, on another processor (AVX2 without VNNI,",
    "other work beside it), a token of qwen3-30b with Q4_0 and int8 inputs spends 59 % of its time in the head, 27 %",
    "in the experts, 11 % in the products of attention, and 3 % in all other nodes. At 8 bits the head has a quarter",
    "of float32's bytes, and scales on top, so it gains less than the 5 x that the whole token should. The rest makes",
    "up for that at 4@128, whose larger blocks have fewer scales, and not at Q4_0.",
)


@dataclass(frozen=True)
class Row:
    """A program with a file."""

    model: str
    bits: int
    program: str  # and, of ONNX Runtime, its file
    n_bytes: int
    export_seconds: float | None
    peak_bytes: int | None  # above those of the process without a model
    prompt_seconds: float
    step_seconds: float


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=list(MODELS))
@click.option("--bits", multiple=True, type=int, default=[form.bits for form in FORMATS])
def main(models: Sequence[str], bits: Sequence[int]) -> None:
    """Measures, prints and writes the tables."""
    torch.set_num_threads(1)
    rows = [row for row in _read_csv() if row.model not in models or row.bits not in bits]
    for model in models:
        with tempfile.TemporaryDirectory() as name:
            checkpoint = shaped_checkpoint(model, _EXPERTS, Path(name))
            for form in FORMATS:
                if form.bits in bits:
                    rows.extend(_Comparison(model, checkpoint, form, Path(name)).rows())
    rows.sort(key=lambda row: (list(MODELS).index(row.model), -row.bits))
    _write_csv(rows)
    text = "\n".join(page(rows)) + "\n"
    (_RESULTS / "onnx.md").write_text(text, encoding="utf-8")
    print(text)


class _Comparison:
    """All programs with files of as many bits."""

    def __init__(self, model: str, checkpoint: Path, form: Format, folder: Path) -> None:
        self._model, self._checkpoint, self._form, self._folder = model, checkpoint, form, folder
        self._files = {f"{_LLAMA_CPP}, {form.gguf}": write_gguf_file(checkpoint, form, folder)}
        for onnx in form.onnx:
            inputs = f", {onnx.inputs} inputs" if form.bits == 4 else ""
            self._files[f"ONNX Runtime, {onnx.encoding}{inputs}"] = write_onnx_folder(checkpoint, onnx, folder)

    def rows(self) -> Iterator[Row]:
        """Measures speed and memory."""
        for open_sides in (self._sides, self._other_exporters):  # one after the other: memory has no room for all
            for program, found in measure(open_sides(), list(_answers())).items():
                yield self._row(program, found, self._files.get(program))
            gc.collect()

    def _sides(self) -> dict[str, Side]:
        sides: dict[str, Side] = {
            name: LlamaCpp(written.path, _CONTEXT) if name.startswith(_LLAMA_CPP) else OnnxRuntime(written.path)
            for name, written in self._files.items()
        }
        return sides | ({"torch, eager": TorchEager(self._checkpoint)} if self._form.bits == 32 else {})

    def _other_exporters(self) -> dict[str, Side]:
        if self._form.bits != 32:
            return {}
        if can_export():
            self._files[_EXPORTER] = write_by_transformers(self._checkpoint, self._folder)
        else:
            print("transformers' own exporter is left out: onnxscript is not installed")
        if known_to_optimum(self._checkpoint):
            self._files[_OPTIMUM] = write_by_optimum(self._checkpoint, self._folder)
        return {name: OtherOnnx(self._files[name].path) for name in (_EXPORTER, _OPTIMUM) if name in self._files}

    def _row(self, program: str, times: Times, written: Written | None) -> Row:
        form = self._form
        peak: int | None = None
        if written is None:
            n_bytes = sum(file.stat().st_size for file in self._checkpoint.glob("*.safetensors"))
        else:
            n_bytes = written.n_bytes
        if written is not None and program not in (_EXPORTER, _OPTIMUM):  # whose graphs have other inputs
            artifact = "gguf" if program.startswith(_LLAMA_CPP) else "onnx"
            prompt = np.arange(1, _CONTEXT + 1)
            cost = measure_artifact(artifact, written.path, context=_CONTEXT, kv_type="f16", threads=1, prompt=prompt)
            peak = cost.peak_rss_bytes - cost.base_rss_bytes
        seconds = None if written is None else written.seconds
        return Row(self._model, form.bits, program, n_bytes, seconds, peak, times.prompt, times.step)


def _answers() -> Iterator[tuple[list[int], list[int]]]:
    generator = np.random.default_rng(0)
    for _ in range(_ROUNDS + 1):
        yield generator.integers(1, _TOKENS, _PROMPT).tolist(), generator.integers(1, _TOKENS, _STEPS).tolist()


def _read_csv() -> list[Row]:
    if not _CSV.exists():
        return []
    with _CSV.open(newline="", encoding="utf-8") as file:
        return [_row_of(cells) for cells in csv.DictReader(file)]


def _row_of(cells: Mapping[str, str]) -> Row:
    return Row(
        cells["model"],
        int(cells["bits"]),
        cells["program"],
        int(cells["n_bytes"]),
        float(cells["export_seconds"]) if cells["export_seconds"] else None,
        int(cells["peak_bytes"]) if cells["peak_bytes"] else None,
        float(cells["prompt_seconds"]),
        float(cells["step_seconds"]),
    )


def _write_csv(rows: Sequence[Row]) -> None:
    with _CSV.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = asdict(row).items()
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in cells})


def page(rows: Sequence[Row]) -> list[str]:
    """The lines of the page; times are shown beside llama.cpp's with as many bits."""
    return [
        "# Our ONNX files beside llama.cpp",
        "",
        f"{LAYERS} layers of each shape with {_EXPERTS} experts, 8 of them for each token; random weights; one",
        f"thread; onnxruntime {onnxruntime.__version__}. {_ROUNDS} prompts of {_PROMPT} tokens and {_STEPS} tokens",
        "behind each, in turns, the other exporters' graphs by themselves: medians of CPU time, and in brackets their",
        "ratio to llama.cpp's at as many bits. Below 8 bits embedding and head have 8 in both files. llama.cpp repacks",
        "weights, as it does by default. Logits are made at the last position of a prompt alone, by other exporters'",
        f"graphs at all. Memory is above the process without a model, with {_CONTEXT} tokens of cache; writing takes",
        "CPU time of one thread, with the kernels' codes. Written by `python -m benchmarks.onnx`.",
        "",
        "| shape | bits | program | MB | s to write | MB of memory | ms for a token | ms for a prompt |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row, _peer(row, rows)) for row in rows),
        "",
        f"At 4 bits a token may take {_MOST_STEP} x and a prompt {_MOST_PROMPT} x llama.cpp's time, and optimum's",
        f"graph, in float32, should take {_LEAST_OPTIMUM:g} x the time for a token:",
        "",
        *_verdicts(rows),
        *_beside_optimum(rows),
        "",
        *_LIMITS,
    ]


def _peer(row: Row, rows: Sequence[Row]) -> Row:
    like = (other for other in rows if (other.model, other.bits) == (row.model, row.bits))
    return next(other for other in like if other.program.startswith(_LLAMA_CPP))


def _line(row: Row, peer: Row) -> str:
    seconds = "" if row.export_seconds is None else f"{row.export_seconds:.1f}"
    memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
    step, prompt = row.step_seconds / peer.step_seconds, row.prompt_seconds / peer.prompt_seconds
    return (
        f"| {row.model} | {row.bits} | {row.program} | {row.n_bytes / 1e6:.0f} | {seconds} | {memory} "
        f"| {1e3 * row.step_seconds:.1f} ({step:.2f}) | {1e3 * row.prompt_seconds:.0f} ({prompt:.2f}) |"
    )


def _verdicts(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.bits != 4 or row.program.startswith(_LLAMA_CPP):
            continue
        peer = _peer(row, rows)
        ratios: Mapping[str, tuple[float, float]] = {
            "a token": (row.step_seconds / peer.step_seconds, _MOST_STEP),
            "a prompt": (row.prompt_seconds / peer.prompt_seconds, _MOST_PROMPT),
        }
        said = ", ".join(
            f"{what} {ratio:.2f} x{' MISSED' if ratio > most else ''}" for what, (ratio, most) in ratios.items()
        )
        yield f"* {row.model}, {row.program}: {said}"


def _beside_optimum(rows: Sequence[Row]) -> Iterator[str]:
    for other in (row for row in rows if row.program == _OPTIMUM):
        for row in rows:
            if (row.model, row.bits) == (other.model, 4) and not row.program.startswith(_LLAMA_CPP):
                ratio = other.step_seconds / row.step_seconds
                missed = " MISSED" if ratio < _LEAST_OPTIMUM else ""
                yield f"* {row.model}, {_OPTIMUM}: {ratio:.1f} x the time of {row.program} for a token{missed}"


if __name__ == "__main__":
    main()
