"""Turns the time limit of recovery into numbers of blocks, once; later stages follow the numbers, never the clock."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence

from compressors.model.description.roles import Role
from compressors.model.parallel import is_first
from compressors.recover.training_memory import TooLargeError
from exporter.estimating.planned_types import same_numbers
from exporter.file_names import SCHEDULE
from exporter.planning.plan import Plan
from exporter.planning.rates import trial_share
from exporter.planning.recipe import RungChoice
from exporter.stages.inputs import open_student, use_threads
from exporter.stages.student.training import training_of
from exporter.work.stage import StageContext

__all__ = ["schedule", "shared_out"]

_BLOCK = 32


def schedule(context: StageContext) -> None:
    """Times one batch of each rung and writes the number of its blocks that fit the limit.

    A batch after quantizing takes as long as one before: reading and converting weights is little beside computing.
    """
    plan = context.plan
    choice = plan.recipe.recover
    blocks = [rung.blocks for rung in choice.trained]
    if choice.trained and plan.recover_seconds > 0:
        use_threads(plan)
        seconds = [_seconds_of_batch(context, rung) * _times(plan, rung) for rung in choice.trained]
        most = [-(-rung.blocks // rung.blocks_per_step) for rung in choice.trained]
        batches = shared_out(plan.recover_seconds, seconds, most)
        blocks = [
            min(rung.blocks, n_batches * rung.blocks_per_step)
            for rung, n_batches in zip(choice.trained, batches, strict=True)
        ]
    if is_first():
        context.file(SCHEDULE).write_text(json.dumps({"blocks": blocks}), encoding="utf-8")


def _times(plan: Plan, rung: RungChoice) -> float:
    """The number of times a rung's blocks are trained: for each file of its own numbers, and in trials of its rate."""
    of_files = 1
    if rung is plan.recipe.recover.after_quantizing and not same_numbers(plan):
        of_files = len(plan.recipe.artifacts)
    return of_files * (1 + (trial_share(rung.scope) if rung.learning_rate is None else 0))


def shared_out(limit: float, seconds_per_batch: Sequence[float], most: Sequence[int]) -> list[int]:
    """Shares batches among rungs: all get the same time, and time that one does not need goes to those after it.

    Every rung gets at least one.
    """
    batches: list[int] = []
    for number, seconds in enumerate(seconds_per_batch):
        share = limit / (len(most) - number)
        batches.append(min(most[number], max(1, int(share / seconds))))
        limit -= batches[-1] * seconds
    return batches


def _seconds_of_batch(context: StageContext, rung: RungChoice) -> float:
    student = open_student(context.plan, context.work, "compress")

    def any_block(role: Role, layer: int) -> int:
        """A stand-in, as no file is written yet; block length matters little beside a matrix's gradient product."""
        return math.gcd(student.spec.dimensions(role, layer)[-1], _BLOCK)

    try:
        training = training_of(context, student, rung, min(rung.blocks_per_step, rung.blocks), 0.0, any_block)
    except TooLargeError:
        return 1.0  # the rung will be rejected
    start = time.monotonic()
    for _ in range(training.settings.n_steps):
        training.step()
    return time.monotonic() - start
