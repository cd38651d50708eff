"""Router KD, accepted only if the divergence on the selection split falls."""

from __future__ import annotations

import json
import time
from typing import Any

from safetensors.torch import save_file

from compressors.model.log_probs import LogProbReader
from compressors.model.student import Student
from compressors.recover.router_kd import RouterKdSettings, mean_divergence, train_routers
from compressors.teacher import TeacherTargets
from exporter.stage import StageContext
from exporter.stages.artifacts import (
    Blocks,
    Calibration,
    StudentFiles,
    fits_in_memory,
    open_student,
    settings_of,
    use_threads,
)
from exporter.stages.schedule import scheduled_blocks
from validate.backend import scored_positions

__all__ = ["run"]


def run(context: StageContext) -> None:
    """Writes the overlay of a successful rung, and what was tried."""
    choice = context.plan.recipe.recover
    rungs: list[dict[str, Any]] = []
    if choice.rung != "none":
        use_threads(context.plan)
        student = open_student(context.plan, context.work, "compress")
        taught, rung = _router_rung(context, student, settings_of(choice, scheduled_blocks(context.work)))
        rungs.append(rung)
        if rung["accepted"]:
            save_file(dict(taught.overlay), StudentFiles(context.output).overlay)
    StudentFiles(context.output).recovery.write_text(json.dumps(rungs, indent=1), encoding="utf-8")


def _router_rung(context: StageContext, student: Student, settings: RouterKdSettings) -> tuple[Student, dict[str, Any]]:
    files = Calibration.of(context.work)
    blocks = Blocks.load(files.blocks)
    selection = LogProbReader(files.selection_log_probs)
    scored = scored_positions(blocks.selection.shape[1])
    start = time.monotonic()
    before = mean_divergence(student, blocks.selection, selection, scored)
    with context.progress.bar("steps", settings.n_steps) as advance:
        taught = train_routers(
            student,
            blocks.calibration,
            TeacherTargets.load(files.targets),
            settings,
            keep_layers=fits_in_memory(student, context.plan.memory_bytes),
            progress=lambda steps, _loss: advance(steps),
        )
    after = mean_divergence(taught, blocks.selection, selection, scored)
    return taught, {
        "rung": "router",
        "loss": "kd",
        "learning_rate": settings.learning_rate,
        "steps": settings.n_steps,
        "tokens": settings.n_blocks * blocks.calibration.shape[1],
        "selection_kld_before": before,
        "selection_kld_after": after,
        "accepted": after < before,
        "seconds": time.monotonic() - start,
    }
