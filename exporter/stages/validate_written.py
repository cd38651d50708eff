"""Runs the written files' own numbers in torch: what a runtime is compared with to see what it changes by itself."""

from __future__ import annotations

from pathlib import Path

from compressors.model.log_probs import LogProbReader, LogProbWriter
from exporter.plan import Plan
from exporter.stage import StageContext
from exporter.stages.artifacts import Blocks, Calibration, memory_limit, open_student, same_numbers, use_threads
from exporter.stages.retune import written_weights
from exporter.stages.validate_torch import EVALUATION
from exporter.work import WorkDirectory
from validate.backend import scored_positions
from validate.evaluation import evaluate
from validate.torch_reference import TorchBackend

__all__ = ["SAME_WEIGHTS", "run", "same_weights", "written_evaluation"]

SAME_WEIGHTS = "same_weights"
"""Under which name a runtime's evaluation knows torch with the same weights."""

_LOG_PROBS = "log_probs"


def run(context: StageContext) -> None:
    """Writes log-probabilities and evaluation of each file's numbers; once, if both files hold the same."""
    plan = context.plan
    use_threads(plan)
    student = open_student(plan, context.work)
    heldout_BT = Blocks.load(Calibration.of(context.work).blocks).heldout.numpy()
    scored = scored_positions(heldout_BT.shape[1])
    n_scored = len(heldout_BT) * (scored.stop - scored.start)
    written = written_weights(plan, context.work, student.shape)
    different = {_whose_numbers(plan, artifact): written[_whose_numbers(plan, artifact)] for artifact in written}
    with context.progress.bar("layers", len(different) * student.shape.n_layers) as advance:
        for artifact, weights in different.items():
            folder = context.output / artifact
            backend = TorchBackend(student.as_written(weights), advance, memory_limit(context))
            record = LogProbWriter(folder / _LOG_PROBS, n_scored, student.shape.vocab_size)
            evaluate(backend, heldout_BT, {}, record=record).save(folder / EVALUATION)


def same_weights(context: StageContext, artifact: str) -> dict[str, LogProbReader]:
    """What torch says with an artifact's numbers, as a reference for its runtime."""
    return {SAME_WEIGHTS: LogProbReader(_folder(context.plan, context.work, artifact) / _LOG_PROBS)}


def written_evaluation(plan: Plan, work: WorkDirectory, artifact: str) -> Path:
    """Torch's evaluation with an artifact's numbers."""
    return _folder(plan, work, artifact) / EVALUATION


def _folder(plan: Plan, work: WorkDirectory, artifact: str) -> Path:
    return work.stage("validate_written") / _whose_numbers(plan, artifact)


def _whose_numbers(plan: Plan, artifact: str) -> str:
    return "gguf" if same_numbers(plan) else artifact
