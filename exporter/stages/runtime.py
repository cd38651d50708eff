"""What both runtimes' validation stages share: cost in a process of its own, fidelity, and a few generations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.log_probs import LogProbReader, LogProbWriter
from exporter.stage import StageContext
from exporter.stages.artifacts import Blocks, Calibration
from exporter.stages.validate_torch import EVALUATION, ROUTER_INPUTS
from validate.backend import RuntimeBackend, scored_positions
from validate.evaluation import evaluate
from validate.generation import generate_texts, generation_figures, prompts_of
from validate.measure import RuntimeCrashError, measure_artifact
from validate.router_alone import router_alone
from validate.router_inputs import RouterInputs

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
    heldout = Blocks.load(Calibration.of(context.work).blocks).heldout.numpy()
    torch.set_num_threads(plan.recipe.threads)
    budget = plan.recipe.budget
    measurement: dict[str, Any] = {"error": None}
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
        measurement["error"] = str(crash)
    else:
        backend = open_backend()
        _evaluate(context, backend, heldout, references, record=record)
        prompts_PT = prompts_of(heldout)
        with context.progress.bar("texts", 2 * len(prompts_PT)) as advance:
            texts = generate_texts(backend, prompts_PT, advance)
        measurement |= {
            "runtime_version": backend.version,
            "cost": asdict(cost),
            "generation": generation_figures(texts, plan.end_tokens),
            "router_alone": _router_alone(context, backend, heldout),
        }
    (context.output / MEASUREMENT).write_text(json.dumps(measurement, indent=1), encoding="utf-8")


def _router_alone(
    context: StageContext, backend: RuntimeBackend, heldout_BT: npt.NDArray[np.int64]
) -> dict[str, Any] | None:
    """Gives the runtime's routers what the student's routers had in torch; None of a dense student."""
    inputs = RouterInputs(context.work.stage("validate_torch") / ROUTER_INPUTS)
    if not inputs.folder.exists():
        return None
    return router_alone(inputs, backend.route(heldout_BT[inputs.chunks()], inputs)).figures()


def _evaluate(
    context: StageContext,
    backend: RuntimeBackend,
    heldout_BT: npt.NDArray[np.int64],
    references: Mapping[str, LogProbReader],
    *,
    record: bool,
) -> None:
    """Writes the evaluation and, if wanted, the backend's own log-probabilities."""
    writer = None
    if record:
        scored = scored_positions(heldout_BT.shape[1])
        n_scored = len(heldout_BT) * (scored.stop - scored.start)
        writer = LogProbWriter(context.output / LOG_PROBS, n_scored, context.plan.teacher_shape.vocab_size)
    teacher = LogProbReader(Calibration.of(context.work).heldout_log_probs)
    with context.progress.bar("chunks", len(heldout_BT)) as advance:
        evaluation = evaluate(backend, heldout_BT, {"teacher": teacher, **references}, record=writer, progress=advance)
    evaluation.save(context.output / EVALUATION)
