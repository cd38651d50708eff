"""Measures how much the output suffers from errors in each of the original's matrices."""

from __future__ import annotations

import torch

from compressors.model.running.arithmetic import dtype_of
from compressors.model.sources.student import Student
from compressors.sensitivity.gathering import gather_sensitivities
from exporter.estimating.estimate import SENSITIVITY_TOKENS
from exporter.file_names import SENSITIVITIES
from exporter.stages.inputs import memory_limit, token_blocks, use_threads
from exporter.work.directory import WorkDirectory
from exporter.work.stage import StageContext

__all__ = ["sensitivity", "watched_blocks"]


def sensitivity(context: StageContext) -> None:
    """Writes :class:`~compressors.sensitivity.matrices.Sensitivities` into the stage's folder.

    It takes about four forward passes over few tokens: an attempt that was killed begins again.
    """
    plan = context.plan
    use_threads(plan)
    teacher = Student.teacher(plan.open_source())
    with context.progress.bar("layers", 2 * teacher.spec.n_layers) as advance:
        gather_sensitivities(
            teacher,
            watched_blocks(context.work),
            context.file(SENSITIVITIES),
            dtype=dtype_of(plan.recipe.arithmetic),
            limit=memory_limit(context),
            device=torch.device(plan.device),
            progress=advance,
        )


def watched_blocks(work: WorkDirectory) -> torch.Tensor:
    """The calibration blocks that are run: the first ones, which come from all domains."""
    blocks_BT = token_blocks(work).calibration
    return blocks_BT[: -(-SENSITIVITY_TOKENS // blocks_BT.shape[1])]
