"""Router KD, accepted only if the divergence on the selection split falls."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compressors.model.arithmetic import dtype_of
from compressors.model.log_probs import LogProbReader
from compressors.model.parallel import is_first
from compressors.model.student import Student
from compressors.model.weight_file import StoredTensors
from compressors.recover.router_kd import RouterKdSettings, RouterTraining, mean_divergence, train_routers
from compressors.teacher import TeacherTargets
from exporter.snapshot import Snapshot
from exporter.stage import StageContext
from exporter.stages.artifacts import (
    Blocks,
    Calibration,
    StudentFiles,
    memory_limit,
    open_student,
    settings_of,
    use_threads,
)
from exporter.stages.schedule import scheduled_blocks
from validate.backend import scored_positions

__all__ = ["run"]

_STATE = "training.safetensors"


def run(context: StageContext) -> None:
    """Writes the overlay of a successful rung, and what was tried."""
    choice = context.plan.recipe.recover
    rungs: list[dict[str, Any]] = []
    if choice.rung != "none":
        use_threads(context.plan)
        student = open_student(context.plan, context.work, "compress")
        routers, rung = _router_rung(context, student, settings_of(choice, scheduled_blocks(context.work)))
        rungs.append(rung)
        if rung["accepted"] and is_first():
            save_file(routers, StudentFiles(context.output).overlay)
    if is_first():
        StudentFiles(context.output).recovery.write_text(json.dumps(rungs, indent=1), encoding="utf-8")


def _router_rung(
    context: StageContext, student: Student, settings: RouterKdSettings
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The routers that were taught, and what it brought."""
    limit = memory_limit(context)
    files = Calibration.of(context.work)
    blocks = Blocks.load(files.blocks)
    selection = LogProbReader(files.selection_log_probs)
    scored = scored_positions(blocks.selection.shape[1])
    start = time.monotonic()
    device = torch.device(context.plan.device)
    before = mean_divergence(student, blocks.selection, selection, scored, limit=limit, device=device)
    training = RouterTraining(
        student,
        blocks.calibration,
        TeacherTargets(files.targets),
        settings,
        limit=limit,
        dtype=dtype_of(context.plan.recipe.arithmetic),
        device=device,
    )
    taught = _train(context, training)
    after = mean_divergence(taught, blocks.selection, selection, scored, limit=limit, device=device)
    return training.overlay(), {
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


def _train(context: StageContext, training: RouterTraining) -> Student:
    """All steps, from the newest snapshot on if there is one."""
    snapshot = Snapshot(context.output / "snapshot")
    found = snapshot.load()
    if found is not None:
        training.restore(StoredTensors(found[1] / _STATE))

    def save(folder: Path) -> None:
        if is_first():  # it is the same in all processes
            save_file(training.state(), folder / _STATE)

    with context.progress.bar("steps", training.settings.n_steps) as advance:
        advance(training.n_done)
        taught = train_routers(
            training, progress=advance, after_step=lambda training: snapshot.keep(training.n_done, save)
        )
    snapshot.remove()
    return taught
