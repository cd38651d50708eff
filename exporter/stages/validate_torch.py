"""Measures the student in torch: the reference for both artifacts."""

from __future__ import annotations

from compressors.model.predictions.log_probs import LogProbReader
from exporter.pipeline.stage import StageContext
from exporter.stages.artifacts import Blocks, Calibration, memory_limit, open_student, use_threads
from validate.metrics.evaluation import evaluate
from validate.runtimes.torch import TorchBackend

__all__ = ["EVALUATION", "run"]

EVALUATION = "evaluation.safetensors"


def run(context: StageContext) -> None:
    """Writes what the student predicts on held-out text."""
    use_threads(context.plan)
    files = Calibration.of(context.work)
    student = open_student(context.plan, context.work)
    heldout_BT = Blocks.load(files.blocks).heldout.numpy()
    with context.progress.bar("layers", student.spec.n_layers) as advance:
        evaluation = evaluate(
            TorchBackend(student, advance, memory_limit(context)),
            heldout_BT,
            {"teacher": LogProbReader(files.heldout_log_probs)},
        )
    evaluation.save(context.output / EVALUATION)
