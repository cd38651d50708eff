"""Measures the student in torch: the reference for both artifacts."""

from __future__ import annotations

from compressors.model.log_probs import LogProbReader
from exporter.stage import StageContext
from exporter.stages.artifacts import Blocks, Calibration, memory_limit, open_student, use_threads
from validate.evaluation import evaluate
from validate.router_alone import RouterInputRecorder
from validate.router_inputs import spread_chunks
from validate.torch_reference import TorchBackend

__all__ = ["EVALUATION", "ROUTER_INPUTS", "run"]

EVALUATION = "evaluation.safetensors"
ROUTER_INPUTS = "router_inputs"
"""A folder; a dense student leaves none."""


def run(context: StageContext) -> None:
    """Writes what the student predicts on held-out text, and what its routers are given on a part of it."""
    use_threads(context.plan)
    files = Calibration.of(context.work)
    student = open_student(context.plan, context.work)
    heldout_BT = Blocks.load(files.blocks).heldout.numpy()
    n_blocks, n_tokens = heldout_BT.shape
    recorder: RouterInputRecorder | None = None
    if not student.shape.is_dense:
        recorder = RouterInputRecorder(context.output / ROUTER_INPUTS, student.shape, spread_chunks(n_blocks), n_tokens)
    observers = [] if recorder is None else [recorder.observe]
    with context.progress.bar("layers", student.shape.n_layers) as advance:
        evaluation = evaluate(
            TorchBackend(student, advance, memory_limit(context), observers),
            heldout_BT,
            {"teacher": LogProbReader(files.heldout_log_probs)},
        )
    evaluation.save(context.output / EVALUATION)
    if recorder is not None and evaluation.routing is not None:
        recorder.finish(evaluation.routing)
