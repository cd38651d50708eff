"""Turns the time limit of recovery into a number of blocks, once: what follows obeys the number, never the clock."""

from __future__ import annotations

import json
import time

import torch

from compressors.model.arithmetic import dtype_of
from compressors.model.parallel import is_first
from compressors.recover.router_kd import RouterTraining
from compressors.teacher import TeacherTargets
from exporter.stage import StageContext
from exporter.stages.artifacts import Blocks, Calibration, memory_limit, open_student, settings_of, use_threads
from exporter.work import WorkDirectory

__all__ = ["run", "scheduled_blocks"]

_FILE = "schedule.json"


def run(context: StageContext) -> None:
    """Times one step of Router KD and writes how many blocks fit the limit."""
    plan = context.plan
    choice = plan.recipe.recover
    n_blocks = choice.blocks
    if choice.rung != "none" and plan.recover_seconds > 0:
        use_threads(plan)
        files = Calibration.of(context.work)
        student = open_student(plan, context.work, "compress")
        one_step = settings_of(choice, min(choice.blocks_per_step, choice.blocks))
        training = RouterTraining(
            student,
            Blocks.load(files.blocks).calibration,
            TeacherTargets(files.targets),
            one_step,
            limit=memory_limit(context),
            dtype=dtype_of(plan.recipe.arithmetic),
            device=torch.device(plan.device),
        )
        start = time.monotonic()
        training.step()
        steps = max(1, int(plan.recover_seconds / (time.monotonic() - start)))
        n_blocks = min(choice.blocks, steps * choice.blocks_per_step)
    if is_first():
        (context.output / _FILE).write_text(json.dumps({"blocks": n_blocks}), encoding="utf-8")


def scheduled_blocks(work: WorkDirectory) -> int:
    """The number of blocks that a finished schedule stage chose."""
    blocks: int = json.loads((work.stage("schedule") / _FILE).read_text(encoding="utf-8"))["blocks"]
    return blocks
