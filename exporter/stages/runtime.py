"""What both runtimes' validation stages share: cost in a process of its own, fidelity, and a few generations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from compressors.model.log_probs import LogProbReader, LogProbWriter
from exporter.stage import StageContext
from exporter.stages.artifacts import Blocks, Calibration
from exporter.stages.validate_torch import EVALUATION
from validate.backend import RuntimeBackend, scored_positions
from validate.evaluation import evaluate
from validate.measure import RuntimeCrashError, measure_artifact
from validate.repetition import measure_repetition

__all__ = ["LOG_PROBS", "MEASUREMENT", "validate_runtime"]

MEASUREMENT = "measurement.json"
LOG_PROBS = "log_probs"


def validate_runtime(
    context: StageContext,
    artifact: str,
    path: Path,
    open_backend: Callable[[], RuntimeBackend],
    *,
    references: Mapping[str, LogProbReader],
    record: bool,
) -> None:
    """Writes the artifact's evaluation and measurement.

    Args:
        context: of the stage.
        artifact: ``gguf`` or ``onnx``.
        path: what is measured.
        open_backend: loads it for evaluation; called after the cost was measured, so a crash is met outside first.
        references: other models' log-probabilities beside the teacher's.
        record: keep the artifact's own log-probabilities, for the other runtime to be compared with.
    """
    plan = context.plan
    files = Calibration.of(context.work)
    heldout = Blocks.load(files.blocks).heldout.numpy()
    torch.set_num_threads(plan.recipe.threads)
    budget = plan.recipe.budget
    try:
        cost = measure_artifact(
            artifact,
            path,
            context=budget.context,
            kv_type=budget.kv_type,
            threads=plan.recipe.threads,
            prompt=heldout[0],
        )
    except RuntimeCrashError as crash:
        (context.output / MEASUREMENT).write_text(json.dumps({"error": str(crash)}), encoding="utf-8")
        return
    backend = open_backend()
    writer = None
    if record:
        scored = scored_positions(heldout.shape[1])
        n_scored = len(heldout) * (scored.stop - scored.start)
        writer = LogProbWriter(context.output / LOG_PROBS, n_scored, plan.teacher_shape.vocab_size)
    with context.progress.bar("chunks", len(heldout)) as advance:
        evaluation = evaluate(
            backend,
            heldout,
            {"teacher": LogProbReader(files.heldout_log_probs), **references},
            record=writer,
            progress=advance,
        )
    if writer is not None:
        writer.close()
    evaluation.save(context.output / EVALUATION)
    prompts = [np.asarray(chunk[:32]) for chunk in heldout[:: max(1, len(heldout) // 12)]]
    measurement = {
        "error": None,
        "runtime_version": backend.version,
        "cost": asdict(cost),
        "repetition": asdict(measure_repetition(backend, prompts, plan.teacher_shape.eos_token_ids)),
    }
    (context.output / MEASUREMENT).write_text(json.dumps(measurement, indent=1), encoding="utf-8")
