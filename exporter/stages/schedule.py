"""Turns the time limit of recovery into numbers of blocks, once: what follows obeys the numbers, never the clock."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from compressors.model.parallel import is_first
from compressors.recover.training_memory import TooLargeError
from exporter.recipe import RungChoice
from exporter.stage import StageContext
from exporter.stages.artifacts import open_student, use_threads
from exporter.stages.training import training_of
from exporter.work import WorkDirectory

__all__ = ["run", "scheduled_blocks", "shared_out"]

_FILE = "schedule.json"


def run(context: StageContext) -> None:
    """Times one batch of each rung and writes how many blocks of it fit the limit.

    A batch after quantizing takes as long as one before: reading and converting weights is little beside computing.
    """
    plan = context.plan
    choice = plan.recipe.recover
    blocks = [rung.blocks for rung in choice.trained]
    if choice.trained and plan.recover_seconds > 0:
        use_threads(plan)
        seconds = [_seconds_of_batch(context, rung) for rung in choice.trained]
        most = [-(-rung.blocks // rung.blocks_per_step) for rung in choice.trained]
        batches = shared_out(plan.recover_seconds, seconds, most)
        blocks = [
            min(rung.blocks, n_batches * rung.blocks_per_step)
            for rung, n_batches in zip(choice.trained, batches, strict=True)
        ]
    if is_first():
        (context.output / _FILE).write_text(json.dumps({"blocks": blocks}), encoding="utf-8")


def scheduled_blocks(work: WorkDirectory) -> list[int]:
    """The numbers of blocks that a finished schedule stage chose, for everything that the recipe trains."""
    blocks: list[int] = json.loads((work.stage("schedule") / _FILE).read_text(encoding="utf-8"))["blocks"]
    return blocks


def shared_out(limit: float, seconds_per_batch: Sequence[float], most: Sequence[int]) -> list[int]:
    """Batches of each rung: equal shares of the time, and what a rung does not need is left to those after it.

    Every rung gets one at least.
    """
    batches: list[int] = []
    for number, seconds in enumerate(seconds_per_batch):
        share = limit / (len(most) - number)
        batches.append(min(most[number], max(1, int(share / seconds))))
        limit -= batches[-1] * seconds
    return batches


def _seconds_of_batch(context: StageContext, rung: RungChoice) -> float:
    student = open_student(context.plan, context.work, "compress")
    try:
        training = training_of(context, student, rung, min(rung.blocks_per_step, rung.blocks))
    except TooLargeError:
        return 1.0  # the rung will be rejected
    start = time.monotonic()
    for _ in range(training.settings.n_steps):
        training.step()
    return time.monotonic() - start
