"""Measures how fast llama.cpp decodes each type on one core; writes ``results/decode.{csv,md}``.

    python -m benchmarks.decode

Files have the shape of OLMoE's layers, 2 of them with 16 experts, of which a token reads 8 as in the model; random
weights and one type throughout. A few quantized rows are repeated: they are written fast and take as long to read as
distinct ones. In each round every file decodes some tokens, one at a time; the fastest round counts. Then presets are
compared with our mixes of no more bytes, whose types are chosen as in an export, by the sensitivities that ship with
the package. All times are the CPU time of the one thread that computes. ``exporter/searching/decode_cost.py`` holds the
figures.
"""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.scale.checkpoints import MODELS, with_layers
from compressors.model.config.reading import read_spec
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.storage_type import StorageType
from compressors.quantize.kernels import quantize_rows
from compressors.sensitivity import default_table
from exporter.hub import resolve_model
from exporter.planning.recipe import BudgetChoice, FileChoice
from exporter.searching.outlook import best_fit
from exporter.searching.speed import most_seconds
from exporter.searching.units import gguf_units
from exporter.searching.untyped_file import UntypedFile
from exporter.writing.gguf.container import TensorEntry, aligned, render_header, render_values
from exporter.writing.gguf.layout import PlannedTensor, plan_tensors
from exporter.writing.gguf.metadata import model_metadata
from exporter.writing.gguf.type_table import weights_of_a_token
from exporter.writing.gguf.vocabulary.metadata import vocabulary_metadata
from exporter.writing.gguf.writer import predict_file_size
from validate.runtimes.llama_cpp import LlamaCppBackend

__all__ = ["one_type"]

_RESULTS = Path(__file__).parent / "results"
_NAME = "olmoe"
_LAYERS, _EXPERTS = 2, 16
_ROUNDS, _TOKENS = 3, 8
_DISTINCT_ROWS = 64
_REFERENCE = "Q4_K"
_TYPES = (
    *("F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K"),
    *("IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "Q2_0", "IQ1_M", "IQ1_S"),
)
_PRESETS = ("Q6_K", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K", "IQ2_M")
_SLOWEST = 0.8  # of the preset's speed


@dataclass(frozen=True)
class Measured:
    """The best round of one file."""

    name: str
    n_bytes: int
    seconds: float  # per token
    n_values: float  # weights that one token uses

    @property
    def nanoseconds(self) -> float:
        """Nanoseconds per weight."""
        return 1e9 * self.seconds / self.n_values


@click.command()
@click.option("--rounds", default=_ROUNDS, show_default=True)
@click.option("--tokens", default=_TOKENS, show_default=True)
def main(rounds: int, tokens: int) -> None:
    """Measures, prints and writes the tables."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        bench = _Bench(Path(name), rounds, tokens)
        types = bench.measure({name: one_type(bench.spec, name) for name in _TYPES})
        pairs = [
            bench.measure({preset: plan_tensors(bench.spec, preset), "ours": bench.tensors_like(preset)})
            for preset in _PRESETS
        ]
    _write(types, list(zip(_PRESETS, pairs, strict=True)), rounds, tokens)


@dataclass(frozen=True)
class _WithoutWeights:
    """The original: everything but its weights is there."""

    path: Path
    spec: ModelSpec
    tokenizer_folder: Path


class _Bench:
    def __init__(self, folder: Path, rounds: int, tokens: int) -> None:
        self._folder = folder
        path = folder / "source"
        _write_config({**with_layers(MODELS["olmoe"], _LAYERS), "num_experts": _EXPERTS}, path)
        self.spec = read_spec(path)
        self._source = _WithoutWeights(path, self.spec, path)
        self._rounds, self._tokens = rounds, tokens

    def measure(self, files: Mapping[str, Sequence[PlannedTensor]]) -> list[Measured]:
        """Measures files in turns; ``files`` holds the tensors of each, by name."""
        paths = {name: self._folder / f"{name}.gguf" for name in files}
        for name, path in paths.items():
            self._write(files[name], path)
        best = dict.fromkeys(files, float("inf"))
        for _ in range(self._rounds):
            for name, path in paths.items():
                best[name] = min(best[name], self._seconds(path))
        found = [
            Measured(name, path.stat().st_size, best[name], _values_of_token(files[name], self.spec))
            for name, path in paths.items()
        ]
        for path in paths.values():
            path.unlink()
        return found

    def tensors_like(self, preset: str) -> Sequence[PlannedTensor]:
        """The tensors of a file of ours with no more bytes than the preset's."""
        n_bytes = predict_file_size(self.spec, self._source, preset, _NAME)
        budget = BudgetChoice(bytes=n_bytes, kind="file", context=512, kv_type="f16")
        choice = FileChoice(mix="Q8_0")
        table = default_table(self.spec, gguf_units(self.spec, StorageType.BF16, choice))
        untyped = UntypedFile("gguf", self._source, _NAME, self.spec, budget, 1, choice)
        fitted = best_fit(untyped, table, most_seconds(untyped, "quality"))
        assert fitted is not None, preset
        return plan_tensors(self.spec, fitted.choice.mix, fitted.choice.tensors)

    def _write(self, tensors: Sequence[PlannedTensor], path: Path) -> None:
        metadata = model_metadata(self.spec, self._source, _NAME, "Q8_0")
        metadata |= vocabulary_metadata(self._source.tokenizer_folder, self.spec.vocab_size)
        entries = [TensorEntry(tensor.name, tensor.shape, tensor.ggml_type, tensor.n_bytes) for tensor in tensors]
        with path.open("wb") as file:
            file.write(render_header(len(metadata), render_values(metadata), entries))
            for tensor in tensors:
                data = _repeated(tensor)
                file.write(data)
                file.write(bytes(aligned(len(data)) - len(data)))

    def _seconds(self, path: Path) -> float:
        """CPU seconds per token."""
        backend = LlamaCppBackend(path, threads=1)
        tokens = np.random.default_rng(0).integers(4096, size=self._tokens + 1).tolist()
        start = 0.0

        def choose(_logits: object) -> int | None:
            nonlocal start
            if not start:
                start = time.thread_time()  # the prompt is read, and memory is touched
            return tokens.pop() if tokens else None

        backend.generate([1, 2], self._tokens + 2, choose)
        return (time.thread_time() - start) / self._tokens


def _write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Writes a checkpoint without weights, with the bundled tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(resolve_model(None) / name, folder / name)


def one_type(spec: ModelSpec, type_name: str) -> Sequence[PlannedTensor]:
    """The tensors of a file all of whose matrices have one type."""
    matrices = [tensor.name for tensor in plan_tensors(spec, "BF16") if tensor.is_matrix]
    return plan_tensors(spec, "BF16", dict.fromkeys(matrices, type_name))


def _values_of_token(tensors: Sequence[PlannedTensor], spec: ModelSpec) -> float:
    return sum(weights_of_a_token(spec, tensor) for tensor in tensors if tensor.is_matrix)


def _repeated(tensor: PlannedTensor) -> bytes:
    """The stored bytes of a tensor: matrices and routers repeat a few random rows, other tensors hold ones."""
    n_rows = tensor.n_values // tensor.row_length
    if tensor.role is Role.ROUTER or tensor.is_matrix:
        rows_RN = torch.randn(
            min(_DISTINCT_ROWS, n_rows), tensor.row_length, generator=torch.Generator().manual_seed(0)
        )
        rows_RN *= 1.0 / tensor.row_length**0.5
    else:
        rows_RN = torch.ones(n_rows, tensor.row_length)
    weights_N = torch.ones(tensor.row_length)
    data = bytes(quantize_rows(rows_RN, GGMLQuantizationType(tensor.ggml_type), weights_N, name=tensor.name))
    return data * (n_rows // len(rows_RN)) + data[: len(data) // len(rows_RN) * (n_rows % len(rows_RN))]


def _write(
    types: Sequence[Measured], pairs: Sequence[tuple[str, Sequence[Measured]]], rounds: int, tokens: int
) -> None:
    reference = next(one for one in types if one.name == _REFERENCE)
    with (_RESULTS / "decode.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("file", "beside", "bytes", "seconds_per_token", "nanoseconds_per_value"))
        for one, beside in [(one, "") for one in types] + [(one, preset) for preset, pair in pairs for one in pair]:
            writer.writerow((one.name, beside, one.n_bytes, f"{one.seconds:.5g}", f"{one.nanoseconds:.4g}"))
    lines = [
        "# Decoding in llama.cpp, type by type",
        "",
        f"Layers of OLMoE's shape ({_LAYERS}, with {_EXPERTS} experts, 8 of them for each token), random weights, one",
        f"thread: CPU time of a token, the best of {rounds} rounds of {tokens} tokens in turns. Written by",
        "`python -m benchmarks.decode`; `exporter/searching/decode_cost.py` holds the figures.",
        "",
        "| type of all matrices | ms for a token | ns for a value | speed, Q4_K = 1 |",
        "|---|---|---|---|",
    ]
    for one in types:
        speed = reference.seconds / one.seconds
        lines.append(f"| {one.name} | {1e3 * one.seconds:.1f} | {one.nanoseconds:.3f} | {speed:.2f} |")
    lines += [
        "",
        f"Ours with no more bytes than a preset, in the same rounds; at least {_SLOWEST} of its speed is wanted:",
        "",
        "| preset | MB | tokens/s | ours, MB | tokens/s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for preset, (theirs, ours) in pairs:
        ratio = theirs.seconds / ours.seconds
        said = "" if ratio >= _SLOWEST else " MISSED"
        lines.append(
            f"| {preset} | {theirs.n_bytes / 1e6:.1f} | {1 / theirs.seconds:.1f} | {ours.n_bytes / 1e6:.1f} "
            f"| {1 / ours.seconds:.1f} | {ratio:.2f}{said} |"
        )
    (_RESULTS / "decode.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
