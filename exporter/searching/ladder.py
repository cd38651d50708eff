"""The rungs of recovery that a structure gets, before its files are written and beside their codes."""

from __future__ import annotations

from compressors.model.sources.source import Source
from exporter.estimating.planned_types import planned_block_length
from exporter.planning.compression import expected_spec
from exporter.planning.plan import Plan
from exporter.planning.recipe import CompressChoice, Recipe, RecoverChoice, RungChoice
from exporter.planning.recovery import Machine, RefusedRung, choose_ladder, tuning_rung, wish_for
from exporter.searching.structures import whole

__all__ = ["TRIAL_BLOCKS", "ladder", "ladder_for", "machine_for", "rung_beside_codes"]

_WORTH_TEACHING = 0.005
"""Divergence, nats, from which norms and block scales of a file are trained: below, they gain a few percent at most."""

_BLOCKS = 80  # 40,960 tokens

TRIAL_BLOCKS = 16
"""Blocks of recovery with which a search tries a structure: enough to see whether it helps, and about how much."""


def ladder(
    wish: str, compress: CompressChoice, source: Source, machine: Machine, seed: int
) -> tuple[RecoverChoice, tuple[RefusedRung, ...]]:
    """Returns the rungs that a wish means for a structure before files are written, and those that do not fit.

    ``auto`` trains nothing of the original.

    Args:
        wish: one of :data:`exporter.planning.recovery.RECOVERIES`.
        compress: the structure.
        source: the original.
        machine: the resources that training may use.
        seed: the seed of the order of blocks, and of adapters' initial values.
    """
    is_original = compress == whole(source.spec)
    return choose_ladder(
        "none" if wish == "auto" and is_original else wish_for(wish, compress),
        expected_spec(compress, source.spec),
        source.storage_type.itemsize,
        machine,
        seed,
    )


def machine_for(source: Source, memory_bytes: int, calibration_blocks: int) -> Machine:
    """Says what training may use; models stay where the original leaves half of the memory to the student."""
    return Machine(memory_bytes, calibration_blocks, models_stay=source.n_bytes < memory_bytes // 2)


def ladder_for(compress: CompressChoice, plan: Plan) -> tuple[RecoverChoice, tuple[RefusedRung, ...]]:
    """Returns the :func:`ladder` that a run climbs with this structure."""
    assert plan.search is not None, "the recipe stands"
    source = plan.open_source()
    return ladder(plan.search.recover, compress, source, _machine(plan, source), plan.recipe.recover.seed)


def rung_beside_codes(recipe: Recipe, plan: Plan, expected: float) -> RungChoice | None:
    """The rung that trains routers, norms and block scales of the finished files; None if it is not worth its cost.

    Args:
        recipe: gives the structure and the types of its files.
        plan: gives the wish of ``--recover``, text and memory.
        expected: the divergence of the files before it, in nats.
    """
    assert plan.search is not None, "the recipe stands"
    source = plan.open_source()
    machine, spec = _machine(plan, source), expected_spec(recipe.compress, source.spec)
    is_dense = not spec.written.n_experts
    if plan.search.recover != "auto" or not machine.models_stay or expected < _WORTH_TEACHING or is_dense:
        return None
    rung = tuning_rung(spec, machine, [planned_block_length(recipe, name, spec) for name in recipe.artifacts])
    return None if rung is None else rung.model_copy(update={"blocks": min(_BLOCKS, rung.blocks)})


def _machine(plan: Plan, source: Source) -> Machine:
    return machine_for(source, plan.memory_bytes, plan.recipe.text.calibration_blocks)
