"""Measures in torch: the student, and the written files' own numbers, which show a runtime's own changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.description.spec import ModelSpec
from compressors.model.predictions.head_inputs import HeadInputs, RemadeLogProbs
from compressors.model.predictions.routing_record import RoutingRecord
from exporter.file_names import (
    EVALUATION,
    HELDOUT_PREDICTIONS,
    ROUTER_INPUTS,
    ROUTING,
    WRITTEN_EVALUATION,
    WRITTEN_PREDICTIONS,
)
from exporter.stages.finished import SAME_WEIGHTS, whose_numbers
from exporter.stages.inputs import (
    memory_limit,
    open_student,
    student_of_files,
    teacher_predictions,
    token_blocks,
    use_threads,
    written_weights,
)
from exporter.work.stage import StageContext
from validate.metrics.evaluation import evaluate
from validate.routing.router_alone import RouterInputRecorder
from validate.routing.router_inputs import RouterInputs, spread_chunks
from validate.runtimes.backend import ChunkOutput, scored_positions
from validate.runtimes.torch import TorchBackend

__all__ = [
    "router_inputs",
    "same_weights",
    "validate_torch",
    "validate_written",
]


def validate_torch(context: StageContext) -> None:
    """Writes the student's predictions on held-out text: the reference for both artifacts.

    A student that is the original is not run: calibration knows what it says.
    """
    use_threads(context.plan)
    student = open_student(context.plan, context.work)
    heldout_BT = token_blocks(context.work).heldout.numpy()
    teacher = teacher_predictions(context.plan, context.work, HELDOUT_PREDICTIONS)
    with context.progress.bar("layers", student.spec.n_layers) as advance:
        if student.is_original:  # calibration has run it over this text
            routing = RoutingRecord.load(context.work.path("calibrate", ROUTING))
            evaluation = evaluate(_AsCalibrated(teacher, routing), heldout_BT, {}).beside_itself("teacher")
        else:
            backend = TorchBackend(student, advance, memory_limit(context))
            evaluation = evaluate(backend, heldout_BT, {"teacher": teacher})
    evaluation.save(context.file(EVALUATION))


class _AsCalibrated:
    """The original as calibration found it; implements :class:`validate.runtimes.backend.Backend`."""

    runtime = TorchBackend.runtime

    def __init__(self, predictions: RemadeLogProbs, routing: RoutingRecord) -> None:
        self._predictions = predictions
        self._routing = routing

    @property
    def version(self) -> str:
        """torch's version."""
        return torch.__version__

    def run(self, tokens_BT: npt.NDArray[np.int64]) -> Iterator[ChunkOutput]:
        """Yields what is known of each chunk, which must be calibration's held-out ones."""
        n_chunks, n_tokens = tokens_BT.shape
        scored = scored_positions(n_tokens)
        n_scored = scored.stop - scored.start
        for chunk in range(n_chunks):
            yield ChunkOutput(
                logits_SV=self._predictions.logits(chunk * n_scored, (chunk + 1) * n_scored).numpy(),
                routing=self._routing.tokens(slice(chunk * n_tokens, (chunk + 1) * n_tokens)),
            )


def validate_written(context: StageContext) -> None:
    """Writes predictions and evaluation of each file's numbers, and the inputs of its routers on some chunks.

    If both files hold the same numbers, they run once.
    """
    plan = context.plan
    use_threads(plan)
    student = student_of_files(plan, context.work)
    heldout_BT = token_blocks(context.work).heldout.numpy()
    scored = scored_positions(heldout_BT.shape[1])
    n_scored = len(heldout_BT) * (scored.stop - scored.start)
    written = written_weights(plan, context.work, student.spec)
    different = {whose_numbers(plan, artifact): written[whose_numbers(plan, artifact)] for artifact in written}
    with context.progress.bar("layers", len(different) * student.spec.n_layers) as advance:
        for artifact, weights in different.items():
            inputs = context.file(ROUTER_INPUTS, artifact=artifact)
            recorder = _router_recorder(inputs, student.spec, heldout_BT)
            observers = [] if recorder is None else [recorder.observe]
            predictions = context.file(WRITTEN_PREDICTIONS, artifact=artifact)
            kept = HeadInputs.create(predictions, n_scored, student.spec.hidden_size)
            backend = TorchBackend(student.as_written(weights), advance, memory_limit(context), observers, kept)
            evaluation = evaluate(backend, heldout_BT, {})
            evaluation.save(context.file(WRITTEN_EVALUATION, artifact=artifact))
            if recorder is not None and evaluation.routing is not None:
                recorder.finish(evaluation.routing)


def same_weights(context: StageContext, artifact: str) -> dict[str, RemadeLogProbs]:
    """Torch's log-probabilities with an artifact's numbers, as a reference for its runtime."""
    plan, work = context.plan, context.work
    student = student_of_files(plan, work)
    written = student.as_written(written_weights(plan, work, student.spec, [artifact])[artifact])
    numbers = whose_numbers(plan, artifact)
    inputs = HeadInputs(work.path("validate_written", WRITTEN_PREDICTIONS, artifact=numbers))
    return {SAME_WEIGHTS: RemadeLogProbs(inputs, written)}


def router_inputs(context: StageContext, artifact: str) -> RouterInputs:
    """The router inputs in torch with an artifact's numbers; a student without routers leaves no such folder."""
    numbers = whose_numbers(context.plan, artifact)
    return RouterInputs(context.work.path("validate_written", ROUTER_INPUTS, artifact=numbers))


def _router_recorder(folder: Path, spec: ModelSpec, heldout_BT: npt.NDArray[np.int64]) -> RouterInputRecorder | None:
    if not any(layer.routed for layer in spec.written.layers):
        return None
    n_blocks, n_tokens = heldout_BT.shape
    return RouterInputRecorder(folder, spec, spread_chunks(n_blocks), n_tokens)
