"""The files of trained LightMoE students beside torch; writes ``results/lightmoe_files.md``.

    python -m benchmarks.lightmoe.files [FOLDER]

The students of ``make lightmoe`` with half of their experts' bytes removed, trained as there, are written to ONNX at 4
and at 8 bits, bases and adapters apart, and multiplied out to GGUF. A runtime's perplexity is compared with torch's,
for the student that the file holds. The 4-bit files answer in turns with those of pruned students of the same size. The
results lie in FOLDER, from which a run that was killed goes on; so may two runs of one model each:
``python -m benchmarks.lightmoe.files FOLDER fine``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file

from benchmarks.lightmoe.arms import LIGHT, pruned_evenly
from benchmarks.lightmoe.measure import built, prepare
from benchmarks.onnx_experts import AnsweringModel, opened
from benchmarks.quality.measure import MODELS
from benchmarks.quality.methods import Teacher
from compressors.calibration.splits import BLOCK_LENGTH
from compressors.calibration.statistics import StoredStatistics
from compressors.model.description.roles import Role
from compressors.model.files.integer_blocks import ProductInputs
from compressors.model.files.onnx_names import MODEL_FILE
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import Student
from exporter.writing.files import write_atomically
from exporter.writing.gguf.writer import predict_file_size, write_gguf
from exporter.writing.onnx.encodings import onnx_units
from exporter.writing.onnx.writer import predict_size, write_onnx
from validate.metrics.evaluation import evaluate
from validate.metrics.statistics import perplexity
from validate.runtimes.backend import RuntimeBackend
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.runtimes.torch import TorchBackend

__all__ = ["main"]

_RESULT = Path(__file__).parents[1] / "results/lightmoe_files.md"
_SHARE, _CHUNKS = 0.5, 6
_NAME = "student"
_PRUNED = "pruned"
_ROUNDS, _STEPS = 5, 20
_KINDS: Sequence[tuple[str, str, ProductInputs]] = (
    ("4 bits", "Q4_0", "float32"),
    ("4 bits", "Q4_0", "int8"),
    ("8 bits", "Q8_0", "int8"),
)
"""A name, the encoding of all units, and the inputs of products; those of 8 bits have no other."""


@dataclass(frozen=True)
class _File:
    """A file, its bytes and the original's, and the perplexity of what it holds."""

    kind: str
    n_bytes: int
    predicted_bytes: int
    original_bytes: int  # of the unreplaced model in the same types, predicted
    of_torch: float
    of_runtime: float


def main() -> None:
    """Measures, and writes the page when all models are done."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "moe-export-lightmoe-files"
    for model in sys.argv[2:] or MODELS:
        if not _result(folder, model).exists():
            found = _measured(model, folder / model)
            write_atomically(_result(folder, model), json.dumps(found))
    if all(_result(folder, model).exists() for model in MODELS):
        _RESULT.write_text("\n".join(_page(folder)) + "\n", encoding="utf-8")


def _result(folder: Path, model: str) -> Path:
    return folder / f"{model}.json"


def _measured(model: str, folder: Path) -> dict[str, Any]:
    prepare(model, folder, _CHUNKS)
    student, _ = built(model, LIGHT, _SHARE, folder)
    tokens = load_file(folder / "tokens.safetensors")
    tokens_BT = tokens["heldout"].numpy()
    statistics = StoredStatistics(folder / "statistics", student.source.spec.n_layers)
    teacher = Teacher(student.source, statistics, tokens["training"])
    speeds = _speeds(student, teacher, folder / "speeds", tokens_BT)
    return {"speeds": speeds, "files": [asdict(file) for file in _files(student, folder, tokens_BT)]}


def _files(student: Student, folder: Path, tokens_BT: npt.NDArray[np.int64]) -> Iterator[_File]:
    for name, encoding, inputs in _KINDS:
        yield _onnx_file(student, folder / f"{name} {inputs}", (name, encoding, inputs), tokens_BT)
    yield _gguf_file(_multiplied_out(student), folder / f"{_NAME}.gguf", tokens_BT)


def _speeds(
    student: Student, teacher: Teacher, folder: Path, tokens_BT: npt.NDArray[np.int64]
) -> dict[str, tuple[int, float, float]]:
    """Bytes, and milliseconds of a step, the median and the least, of the student and of a pruned one of its size."""
    spec = teacher.spec
    sizes = {number: predict_size(spec.with_experts(number), "Q4_0") for number in range(spec.top_k, spec.n_experts)}
    wanted = predict_size(student.spec, "Q4_0")
    n_kept = min(sizes, key=lambda number: abs(sizes[number] - wanted))
    pruned = pruned_evenly(teacher, n_kept)
    answering: dict[str, AnsweringModel] = {}
    for name, each in ((LIGHT, student), (_PRUNED, pruned)):
        write_onnx(each, "Q4_0", folder / name, threads=1)
        answering[name] = opened(folder / name / MODEL_FILE)
    for _ in range(_ROUNDS):
        for tokens_T in tokens_BT:
            for model in answering.values():
                model.answer(tokens_T[:-_STEPS], tokens_T[-_STEPS:])
    return {
        name: (
            sum(file.stat().st_size for file in (folder / name).iterdir()),
            1e3 * median(model.steps),
            1e3 * min(model.steps),
        )
        for name, model in answering.items()
    }


def _onnx_file(
    student: Student, folder: Path, kind: tuple[str, str, ProductInputs], tokens_BT: npt.NDArray[np.int64]
) -> _File:
    name, encoding, inputs = kind
    encodings = {unit.name: encoding for unit in onnx_units(student.spec)}
    write_onnx(student, "Q4_0", folder, encodings=encodings, inputs=inputs, threads=1)
    n_bytes = sum(file.stat().st_size for file in folder.iterdir())
    predicted, original = (predict_size(spec, "Q4_0", encodings) for spec in (student.spec, student.source.spec))
    held = student.as_written(OnnxWeights(folder, student.spec))
    found = _perplexities(held, lambda: OnnxRuntimeBackend(folder, threads=1), tokens_BT)
    return _File(f"ONNX, {name}, {inputs} inputs", n_bytes, predicted, original, *found)


def _multiplied_out(student: Student) -> Student:
    """The student with every expert whole: what ``--materialize`` writes."""
    layers = tuple(replace(layer, shared=None) for layer in student.experts.layers)
    overlay = {}
    for index, layer in enumerate(student.spec.layers):
        overlay[student.name(Role.ROUTER, index)] = student.tensor(Role.ROUTER, index)
        for expert in () if layer.bases is None else layer.bases.replaced:
            for tensor in layer.expert_tensors:
                overlay[student.name(tensor.role, index, expert)] = student.expert(tensor.role, index, expert)
    return Student(student.source, replace(student.experts, layers=layers)).with_overlay(overlay)


def _gguf_file(student: Student, path: Path, tokens_BT: npt.NDArray[np.int64]) -> _File:
    write_gguf(student, "Q8_0", path, name=_NAME, threads=1)
    predicted, original = (
        predict_file_size(spec, student.source, "Q8_0", _NAME) for spec in (student.spec, student.source.spec)
    )
    held = student.as_written(GgufWeights(path, student.spec))
    found = _perplexities(held, lambda: LlamaCppBackend(path, threads=1), tokens_BT)
    return _File("GGUF, multiplied out, Q8_0", path.stat().st_size, predicted, original, *found)


def _perplexities(
    held: Student, open_runtime: Callable[[], RuntimeBackend], tokens_BT: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """Torch's and the runtime's."""
    of_torch, of_runtime = (
        perplexity(evaluate(backend, tokens_BT, {}).negative_log_likelihood_N)[0]
        for backend in (TorchBackend(held), open_runtime())
    )
    return of_torch, of_runtime


def _page(folder: Path) -> Iterator[str]:
    yield "# Files of trained LightMoE students"
    yield ""
    yield f"{_SHARE:.0%} of the experts' bytes are removed, and the students are trained as in"
    yield "[lightmoe.md](lightmoe.md). *torch* is the perplexity of the student as the file holds it, in float32; the"
    yield f"runtime's is the file's own, both over {_CHUNKS} held-out chunks of 512 tokens. *original* is the size of"
    yield "the unreplaced model in the same types."
    yield "Written by `python -m benchmarks.lightmoe.files`."
    yield ""
    yield "| model | file | MB | as predicted | original, MB | torch | runtime | difference |"
    yield "|---|---|---|---|---|---|---|---|"
    found = {model: json.loads(_result(folder, model).read_text(encoding="utf-8")) for model in MODELS}
    for model in MODELS:
        for values in found[model]["files"]:
            file = _File(**values)
            is_right = "yes" if file.n_bytes == file.predicted_bytes else "NO"
            yield (
                f"| {model} | {file.kind} | {file.n_bytes / 1e6:.2f} | {is_right} | {file.original_bytes / 1e6:.2f} | "
                f"{file.of_torch:.3f} | {file.of_runtime:.3f} | {file.of_runtime / file.of_torch - 1:+.3%} |"
            )
    yield ""
    yield f"The 4-bit file beside that of a student of its size, pruned by REAP: {_STEPS} tokens of text, one by one,"
    yield f"behind {BLOCK_LENGTH - _STEPS} others, {_ROUNDS} times for each chunk, in turns, on one thread. *speed* is"
    yield "the pruned file's time divided by the file's: of the medians, and of the least."
    yield ""
    yield "| model | student | MB | ms for a token, median and least | speed |"
    yield "|---|---|---|---|---|"
    for model in MODELS:
        speeds = found[model]["speeds"]
        _, usual, least = speeds[_PRUNED]
        for name, (n_bytes, milliseconds, at_best) in speeds.items():
            ratios = f"{usual / milliseconds:.2f}, {least / at_best:.2f}"
            yield f"| {model} | {name} | {n_bytes / 1e6:.2f} | {milliseconds:.2f}, {at_best:.2f} | {ratios} |"


if __name__ == "__main__":
    main()
