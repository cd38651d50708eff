"""Finds out how much the output suffers from errors in each of the original's matrices."""

from __future__ import annotations

import torch

from compressors.model.arithmetic import dtype_of
from compressors.model.checkpoint import Checkpoint
from compressors.model.student import Student
from compressors.sensitivity import gather_sensitivities
from exporter.stage import StageContext
from exporter.stages.artifacts import Blocks, Calibration, memory_limit, use_threads

__all__ = ["N_TOKENS", "run"]

N_TOKENS = 4096
"""Calibration tokens that are enough: with half as many, predictions are as good."""


def run(context: StageContext) -> None:
    """Writes :class:`~compressors.sensitivity.Sensitivities` into the stage's folder.

    It costs some four forward passes over few tokens: an attempt that was killed is begun anew.
    """
    plan = context.plan
    use_threads(plan)
    teacher = Student.teacher(Checkpoint(plan.source))
    blocks_BT = Blocks.load(Calibration.of(context.work).blocks).calibration
    n_blocks = -(-N_TOKENS // blocks_BT.shape[1])  # the leading blocks are of all domains
    with context.progress.bar("layers", 2 * teacher.shape.n_layers) as advance:
        gather_sensitivities(
            teacher,
            blocks_BT[:n_blocks],
            context.output,
            seed=plan.recipe.recover.seed,
            dtype=dtype_of(plan.recipe.arithmetic),
            limit=memory_limit(context),
            device=torch.device(plan.device),
            progress=advance,
        )
