"""The rungs of recovery that a structure gets, before its files are written and beside their codes."""

from __future__ import annotations

from compressors.model.checkpoint import Checkpoint
from exporter.compression import expected_shape
from exporter.plan import Plan
from exporter.recipe import CompressChoice, RecoverChoice
from exporter.recovery import Machine, RefusedRung, choose_ladder, rung_beside_codes

__all__ = ["ladder_for"]

_WORTH_TEACHING = 0.005
"""Divergence, nats, from which norms and block scales of a file are taught: below, they gain a few per cent at most."""


def ladder_for(
    compress: CompressChoice, plan: Plan, expected: float | None = None
) -> tuple[RecoverChoice, tuple[RefusedRung, ...]]:
    """The rungs that a run climbs with this structure, and those that do not fit the memory.

    ``auto`` teaches nothing of the original before its files are written. Narrower experts, which are compensated,
    are taught with all that is around them; fewer ones after their routers.

    Args:
        compress: the structure.
        plan: names the wish of ``--recover``, text and memory.
        expected: the divergence of the files, nats; None leaves out what is taught beside their codes.
    """
    assert plan.search is not None, "the recipe stands"
    wish, source = plan.search.recover, Checkpoint(plan.source)
    shape, itemsize = expected_shape(compress, source.shape), source.dtype.itemsize
    machine = Machine(
        plan.memory_bytes,
        plan.recipe.text.calibration_blocks,
        models_stay=source.n_bytes < plan.memory_bytes // 2,
    )
    before = _before(compress, source) if wish == "auto" else wish
    choice, refused = choose_ladder(before, shape, itemsize, machine, plan.recipe.recover.seed)
    if wish == "auto" and machine.models_stay and expected is not None and expected >= _WORTH_TEACHING:
        rung = rung_beside_codes(shape, itemsize, machine)
        choice = choice.model_copy(update={"after_quantizing": rung})
    return choice, refused


def _before(compress: CompressChoice, source: Checkpoint) -> str:
    if compress == CompressChoice(experts=source.shape.n_experts):
        return "none"
    is_narrower_only = compress.width is not None and compress.method == "none" and compress.student == "moe"
    return "all" if is_narrower_only else "auto"
