"""Finds out how much the output suffers from errors in each of the original's matrices."""

from __future__ import annotations

import torch

from compressors.model.running.arithmetic import dtype_of
from compressors.model.sources.checkpoint import Checkpoint
from compressors.model.sources.student import Student
from compressors.sensitivity import gather_sensitivities
from exporter.estimating.estimate import SENSITIVITY_TOKENS
from exporter.pipeline.stage import StageContext
from exporter.pipeline.work import WorkDirectory
from exporter.stages.artifacts import Blocks, Calibration, memory_limit, use_threads

__all__ = ["run", "watched_blocks"]


def run(context: StageContext) -> None:
    """Writes :class:`~compressors.sensitivity.Sensitivities` into the stage's folder.

    It costs some four forward passes over few tokens: an attempt that was killed is begun anew.
    """
    plan = context.plan
    use_threads(plan)
    teacher = Student.teacher(Checkpoint(plan.source))
    with context.progress.bar("layers", 2 * teacher.spec.n_layers) as advance:
        gather_sensitivities(
            teacher,
            watched_blocks(context.work),
            context.output,
            dtype=dtype_of(plan.recipe.arithmetic),
            limit=memory_limit(context),
            device=torch.device(plan.device),
            progress=advance,
        )


def watched_blocks(work: WorkDirectory) -> torch.Tensor:
    """The calibration blocks that are run: the leading ones, which are of all domains."""
    blocks_BT = Blocks.load(Calibration.of(work).blocks).calibration
    return blocks_BT[: -(-SENSITIVITY_TOKENS // blocks_BT.shape[1])]
