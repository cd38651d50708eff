"""The rungs of recovery that a structure gets."""

from __future__ import annotations

from compressors.model.checkpoint import Checkpoint
from exporter.compression import expected_shape
from exporter.plan import Plan
from exporter.recipe import CompressChoice, RecoverChoice
from exporter.recovery import Machine, RefusedRung, choose_ladder, wish_for

__all__ = ["ladder_for"]


def ladder_for(wish: str, compress: CompressChoice, plan: Plan) -> tuple[RecoverChoice, tuple[RefusedRung, ...]]:
    """The rungs that a wish of ``--recover`` means for a structure, and those that do not fit the memory.

    The original needs none unless the wish names one.
    """
    source = Checkpoint(plan.source)
    is_original = compress == CompressChoice(experts=source.shape.n_experts)
    machine = Machine(
        plan.memory_bytes,
        plan.recipe.text.calibration_blocks,
        models_stay=source.n_bytes < plan.memory_bytes // 2,
    )
    return choose_ladder(
        "none" if wish == "auto" and is_original else wish_for(wish, compress),
        expected_shape(compress, source.shape),
        source.dtype.itemsize,
        machine,
        plan.recipe.recover.seed,
    )
