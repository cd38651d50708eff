"""Runs the written files' own numbers in torch, as a reference that shows what a runtime changes by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from compressors.model.description.spec import ModelSpec
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from exporter.pipeline.stage import StageContext
from exporter.pipeline.work import WorkDirectory
from exporter.planning.plan import Plan
from exporter.stages.artifacts import Blocks, Calibration, memory_limit, open_student, same_numbers, use_threads
from exporter.stages.retune import written_weights
from exporter.stages.validate_torch import EVALUATION
from validate.metrics.evaluation import evaluate
from validate.routing.router_alone import RouterInputRecorder
from validate.routing.router_inputs import RouterInputs, spread_chunks
from validate.runtimes.backend import scored_positions
from validate.runtimes.torch import TorchBackend

__all__ = ["SAME_WEIGHTS", "router_inputs", "run", "same_weights", "written_evaluation"]

SAME_WEIGHTS = "same_weights"
"""The name of torch with the same weights in a runtime's evaluation."""

_LOG_PROBS = "log_probs"
_ROUTER_INPUTS = "router_inputs"


def run(context: StageContext) -> None:
    """Writes log-probabilities and evaluation of each file's numbers, and the inputs of its routers on some chunks.

    If both files hold the same numbers, they run once.
    """
    plan = context.plan
    use_threads(plan)
    student = open_student(plan, context.work)
    heldout_BT = Blocks.load(Calibration.of(context.work).blocks).heldout.numpy()
    scored = scored_positions(heldout_BT.shape[1])
    n_scored = len(heldout_BT) * (scored.stop - scored.start)
    written = written_weights(plan, context.work, student.spec)
    different = {_whose_numbers(plan, artifact): written[_whose_numbers(plan, artifact)] for artifact in written}
    with context.progress.bar("layers", len(different) * student.spec.n_layers) as advance:
        for artifact, weights in different.items():
            folder = context.output / artifact
            recorder = _router_recorder(folder, student.spec, heldout_BT)
            observers = [] if recorder is None else [recorder.observe]
            backend = TorchBackend(student.as_written(weights), advance, memory_limit(context), observers)
            record = LogProbWriter(folder / _LOG_PROBS, n_scored, student.spec.vocab_size)
            evaluation = evaluate(backend, heldout_BT, {}, record=record)
            evaluation.save(folder / EVALUATION)
            if recorder is not None and evaluation.routing is not None:
                recorder.finish(evaluation.routing)


def same_weights(context: StageContext, artifact: str) -> dict[str, LogProbReader]:
    """Torch's log-probabilities with an artifact's numbers, as a reference for its runtime."""
    return {SAME_WEIGHTS: LogProbReader(_folder(context.plan, context.work, artifact) / _LOG_PROBS)}


def router_inputs(context: StageContext, artifact: str) -> RouterInputs:
    """The router inputs in torch with an artifact's numbers; a dense student leaves no such folder."""
    return RouterInputs(_folder(context.plan, context.work, artifact) / _ROUTER_INPUTS)


def _router_recorder(folder: Path, spec: ModelSpec, heldout_BT: npt.NDArray[np.int64]) -> RouterInputRecorder | None:
    if spec.is_dense:
        return None
    n_blocks, n_tokens = heldout_BT.shape
    return RouterInputRecorder(folder / _ROUTER_INPUTS, spec, spread_chunks(n_blocks), n_tokens)


def written_evaluation(plan: Plan, work: WorkDirectory, artifact: str) -> Path:
    """Torch's evaluation with an artifact's numbers."""
    return _folder(plan, work, artifact) / EVALUATION


def _folder(plan: Plan, work: WorkDirectory, artifact: str) -> Path:
    return work.stage("validate_written") / _whose_numbers(plan, artifact)


def _whose_numbers(plan: Plan, artifact: str) -> str:
    return "gguf" if same_numbers(plan) else artifact
