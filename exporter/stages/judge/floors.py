"""Measures the original, unquantized, in llama.cpp and in ONNX Runtime: the floor of each runtime.

The original is written as the runtime takes it, in a type that holds its numbers exactly, and removed when it has been
measured. The whole original was run by torch in calibration; its first layers alone are run here. Neither runtime is
imported before it is needed: the server that forks the stages must not have them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressors.calibration.teacher import by_block
from compressors.model.predictions.head_inputs import HeadInputs, RemadeLogProbs
from compressors.model.predictions.routing_record import RoutingRecord
from compressors.model.sources.student import Student
from exporter.file_names import COST, EVALUATION, GGUF_FILE, HELDOUT_PREDICTIONS, ROUTING
from exporter.planning.teacher_floor import first_layers
from exporter.stages.inputs import memory_limit, teacher_predictions, token_blocks, use_threads
from exporter.stages.judge.runtimes import limit_runtime
from exporter.work.stage import StageContext
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from validate.metrics.evaluation import evaluate
from validate.metrics.positions import ReferenceLogProbs
from validate.runtimes.backend import RuntimeBackend, scored_positions
from validate.runtimes.measure import RuntimeCrashError, measure_artifact
from validate.runtimes.torch import TorchBackend

__all__ = ["teacher_gguf", "teacher_onnx"]

Tokens = npt.NDArray[np.int64]


def teacher_gguf(context: StageContext) -> None:
    """Measures the original in llama.cpp."""
    from validate.runtimes.llama_cpp import LlamaCppBackend, exact_kv_type

    recipe = context.plan.recipe

    def write(teacher: Student, weight_type: str, folder: Path, progress: Callable[[int], None]) -> Path:
        folder.mkdir(exist_ok=True)
        path = GGUF_FILE.within(folder, name="teacher")
        name, threads = recipe.source.model, recipe.threads
        write_gguf(teacher, weight_type, path, name=name, threads=threads, progress=progress)
        return path

    _measure_teacher(
        context,
        "gguf",
        write,
        lambda path: LlamaCppBackend(path, kv_type=exact_kv_type(recipe.budget.kv_type), threads=recipe.threads),
    )


def teacher_onnx(context: StageContext) -> None:
    """Measures the original in ONNX Runtime."""
    from validate.runtimes.onnx import OnnxRuntimeBackend

    threads = context.plan.recipe.threads

    def write(teacher: Student, weight_type: str, folder: Path, progress: Callable[[int], None]) -> Path:
        write_onnx(teacher, weight_type, folder, threads=threads, progress=progress)
        return folder

    _measure_teacher(context, "onnx", write, lambda path: OnnxRuntimeBackend(path, threads=threads))


def _measure_teacher(
    context: StageContext,
    artifact: str,
    write: Callable[[Student, str, Path, Callable[[int], None]], Path],
    open_backend: Callable[[Path], RuntimeBackend],
) -> None:
    """Writes the runtime's evaluation against torch with the same weights, torch's routing, and the whole model's cost.

    Args:
        context: the context of the stage.
        artifact: ``gguf`` or ``onnx``.
        write: writes a model in a type of weights into a folder, reporting the bytes written; returns the path to open.
        open_backend: loads that path.
    """
    floor = context.plan.teacher_floors[artifact]
    use_threads(context.plan)
    heldout_BT = token_blocks(context.work).heldout.numpy()
    chunks = _spread(len(heldout_BT), floor.n_chunks)
    tokens_BT = heldout_BT[chunks]
    folder = context.output / "removed"
    try:
        teacher = first_layers(context.plan.open_source(), floor.n_layers)
        is_whole = floor.n_layers == teacher.source.spec.n_layers
        if is_whole:
            reference, routing = _of_calibration(context, chunks, heldout_BT.shape[1])
        else:
            reference, routing = _by_torch(context, teacher, tokens_BT, folder)
        with context.progress.bar("bytes", floor.file_bytes) as advance:
            path = write(teacher, floor.weight_type, folder, advance)
        limit_runtime(context, artifact, path, tokens_BT.shape[1])
        cost = _cost(context, artifact, path, tokens_BT[0]) if is_whole else None
        with context.progress.bar("chunks", len(chunks)) as advance:
            evaluation = evaluate(open_backend(path), tokens_BT, {"teacher": reference}, progress=advance)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    evaluation.save(context.file(EVALUATION))
    routing.save(context.file(ROUTING))
    context.file(COST).write_text(json.dumps(cost), encoding="utf-8")


def _cost(context: StageContext, artifact: str, path: Path, prompt: npt.NDArray[np.int64]) -> dict[str, Any] | None:
    """Measures memory and speed as for shipped files; None if the runtime dies of it."""
    recipe = context.plan.recipe
    budget = recipe.budget
    try:
        cost = measure_artifact(
            artifact,
            path,
            context=budget.context,
            kv_type=budget.kv_type,
            threads=recipe.threads,
            prompt=prompt,
            memory_bytes=context.plan.memory_bytes,
        )
    except RuntimeCrashError:
        return None
    return asdict(cost)


def _spread(n_chunks: int, n_wanted: int) -> list[int]:
    """The middle one of each of ``n_wanted`` equal stretches, so that every domain has some; all if there are fewer."""
    n_taken = min(n_chunks, n_wanted)
    return [(2 * index + 1) * n_chunks // (2 * n_taken) for index in range(n_taken)]


def _of_calibration(
    context: StageContext, chunks: Sequence[int], n_tokens: int
) -> tuple[ReferenceLogProbs, RoutingRecord]:
    """The log-probabilities and routing that the teacher's pass stored for these chunks."""
    routing = RoutingRecord.load(context.work.path("calibrate", ROUTING))
    log_probs = teacher_predictions(context.plan, context.work, HELDOUT_PREDICTIONS)
    tokens = np.concatenate([np.arange(chunk * n_tokens, (chunk + 1) * n_tokens) for chunk in chunks])
    scored = scored_positions(n_tokens)
    reference = _SomeChunks(log_probs, chunks, scored.stop - scored.start)
    return reference, RoutingRecord(routing.experts_LTK[:, tokens], routing.weights_LTK[:, tokens])


def _by_torch(
    context: StageContext, model: Student, tokens_BT: Tokens, folder: Path
) -> tuple[ReferenceLogProbs, RoutingRecord]:
    """Runs the model in torch; its predictions go into the folder."""
    scored = scored_positions(tokens_BT.shape[1])
    n_scored = len(tokens_BT) * (scored.stop - scored.start)
    kept = HeadInputs.create(folder / "predictions.npy", n_scored, model.spec.hidden_size)
    with context.progress.bar("layers", model.spec.n_layers) as advance:
        evaluation = evaluate(TorchBackend(model, advance, memory_limit(context), kept=kept), tokens_BT, {})
    assert evaluation.routing is not None, "every original has experts"
    return RemadeLogProbs(kept, model), evaluation.routing


class _SomeChunks:
    """The log-probabilities of some chunks, one after the other, from a file of all."""

    def __init__(self, whole: RemadeLogProbs, chunks: Sequence[int], n_scored: int) -> None:
        self._whole = whole
        self._chunks = chunks
        self._n_scored = n_scored

    def __len__(self) -> int:
        return len(self._chunks) * self._n_scored

    def decoded(self, start: int, stop: int) -> torch.Tensor:
        """Log-probabilities of positions start..stop of these chunks: float32 [stop - start, V]."""
        pieces = by_block(slice(start, stop), self._n_scored, self._chunks)
        return torch.cat([self._whole.decoded(place, place + rows.stop - rows.start) for place, rows in pieces])
