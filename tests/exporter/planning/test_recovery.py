"""The ladder that a machine can climb, and the schedule that a time limit allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from compressors.recover.training_memory import training_bytes
from exporter.planning.recipe import CompressChoice, RecoverChoice, RungChoice, RungLoss
from exporter.planning.recovery import (
    RECOVERIES,
    Machine,
    check_after_quantizing,
    choose_ladder,
    schedule_of,
    scope_of,
    tuning_rung,
    wish_for,
)
from exporter.stages.student.schedule import shared_out
from tests.altered import altered

_ROUTER = RungChoice(scope="router", blocks=8, blocks_per_step=8, learning_rate=0.001)
_PLENTY = Machine(10**12, 10_000, models_stay=True)


@pytest.fixture(scope="module")
def pruned(fine_folder: Path) -> ModelSpec:
    return open_source(fine_folder).spec.with_experts(16)


def _trained(scope: str, spec: ModelSpec, rank: int | None = None) -> int:
    rung = RungChoice(scope=scope, rank=rank, blocks=1, blocks_per_step=1, learning_rate=1)  # type: ignore[arg-type]
    return training_bytes(scope_of(rung), spec).total


@pytest.mark.parametrize("wish", RECOVERIES)
def test_every_wish_is_a_ladder_that_a_large_machine_climbs(wish: str, pruned: ModelSpec) -> None:
    if wish.startswith("replaced"):
        bases = SharedBases((*[0] * 3, *[None] * (pruned.n_experts - 3)), 1, 2)
        pruned = pruned.with_sizes([replace(layer.moe, bases=bases) for layer in pruned.layers])
    choice, refused = choose_ladder(wish, pruned, 2, _PLENTY, seed=3)
    assert not refused
    assert choice.seed == 3
    expected = {"auto": ["router", "experts"], "none": [], "router:published": ["router"]}
    scope, _, loss = wish.partition(":")
    assert [rung.scope for rung in choice.rungs] == expected.get(wish, [scope])
    if loss in get_args(RungLoss):
        assert choice.rungs[0].loss == loss
    for rung in choice.rungs:
        scope_of(rung).check_against(pruned)


def test_what_does_not_fit_is_replaced_by_the_largest_adapters_that_do(pruned: ModelSpec) -> None:
    whole = _trained("experts", pruned)
    plenty, _ = choose_ladder("auto", pruned, 2, _PLENTY, 0)
    for rank in (8, 4, 2, 1):
        # the floor under all of them is the same, so the limit is found by the difference
        limit = _least_memory(pruned) - whole + _trained("adapters", pruned, rank)
        choice, refused = choose_ladder("auto", pruned, 2, replace(_PLENTY, memory_bytes=limit), 0)
        assert [(rung.scope, rung.rank) for rung in choice.rungs] == [("router", None), ("adapters", rank)]
        assert [entry.rung for entry in refused] == [
            "router + all experts",
            *(f"router + adapters of rank {larger}" for larger in (8, 4, 2) if larger > rank),
        ]
        assert all("GB of memory" in entry.why for entry in refused)
        assert choice.rungs[0] == plenty.rungs[0]
    choice, refused = choose_ladder("auto", pruned, 2, replace(_PLENTY, memory_bytes=1), 0)
    assert [rung.scope for rung in choice.rungs] == ["router"], "routers need no more than inference"
    assert len(refused) == 5


def _least_memory(spec: ModelSpec) -> int:
    """The smallest memory in which all experts can be trained."""
    too_little, enough = 0, 10**12
    while enough - too_little > 1:
        middle = (too_little + enough) // 2
        if choose_ladder("experts", spec, 2, replace(_PLENTY, memory_bytes=middle), 0)[1]:
            too_little = middle
        else:
            enough = middle
    return enough


def test_narrow_experts_are_taught_with_all_else_at_a_rate_by_their_divergence(pruned: ModelSpec) -> None:
    narrow = CompressChoice(experts=32, width=64)
    assert wish_for("auto", narrow) == "all"
    assert wish_for("router", narrow) == "router"
    assert wish_for("auto", CompressChoice(experts=16)) == "auto"
    assert wish_for("auto", CompressChoice(experts=16, width=64, student="dense")) == "auto"
    (rung,), refused = choose_ladder("all", pruned, 2, _PLENTY, 0)[0].rungs, ()
    assert (rung.scope, rung.learning_rate, refused) == ("all", None, ())


def test_scales_are_tuned_where_memory_is_enough(pruned: ModelSpec) -> None:
    def lengths(role: Role, layer: int) -> int:
        return 32

    rung = tuning_rung(pruned, _PLENTY, [lengths])
    assert rung is not None
    assert (rung.scope, rung.learning_rate) == ("scales", None)
    RecoverChoice(after_quantizing=rung, seed=0)
    too_little, enough = 0, 10**12  # for scales
    while enough - too_little > 1:
        middle = (too_little + enough) // 2
        found = tuning_rung(pruned, replace(_PLENTY, memory_bytes=middle), [lengths])
        too_little, enough = (too_little, middle) if found == rung else (middle, enough)
    norms = tuning_rung(pruned, replace(_PLENTY, memory_bytes=too_little), [lengths])
    assert norms is not None
    assert norms.scope == "norms"
    scales = training_bytes(scope_of(rung), pruned, lengths).weights
    n_matrices = 6 * (16 * 3 * 128 * 256 + 2 * 256 * 256 + 2 * 256 * 128)
    assert scales - training_bytes(scope_of(norms), pruned).weights == 4 * n_matrices // 32
    assert tuning_rung(pruned, replace(_PLENTY, memory_bytes=1), [lengths]) is None


def test_a_dense_student_has_no_routers_to_teach(pruned: ModelSpec) -> None:
    dense = altered(pruned, n_experts=1, top_k=1, expert_width=512)
    assert dense.written.n_experts == 0
    choice, _ = choose_ladder("auto", dense, 2, _PLENTY, 0)
    assert [rung.scope for rung in choice.rungs] == ["experts"]
    taught = choice.model_copy(update={"after_quantizing": _ROUTER})
    check_after_quantizing(taught, pruned)
    check_after_quantizing(choice, dense)
    with pytest.raises(InputError, match=r"after_quantizing .* set it to null"):
        check_after_quantizing(taught, dense)


def test_a_live_teacher_is_read_for_several_batches_if_it_does_not_stay(pruned: ModelSpec) -> None:
    for stays, batches in ((True, 1), (False, 8)):
        choice, _ = choose_ladder("experts:ka", pruned, 2, replace(_PLENTY, models_stay=stays), 0)
        (rung,) = choice.rungs
        assert rung.batches_per_round == batches
        assert schedule_of(choice, rung, 16).n_steps == 4, "two updates for each batch"


def test_steps_are_small_unless_each_reads_the_model_again(pruned: ModelSpec) -> None:
    for stays, per_step in ((True, 2), (False, 8)):
        choice, _ = choose_ladder("auto", pruned, 2, replace(_PLENTY, models_stay=stays), 0)
        assert [rung.blocks_per_step for rung in choice.rungs] == [per_step, per_step]


def test_rates_fall_with_the_hidden_size(pruned: ModelSpec) -> None:
    wide = replace(pruned, hidden_size=8 * pruned.hidden_size)
    ladders = [choose_ladder("auto", shape, 2, _PLENTY, 0)[0].rungs for shape in (pruned, wide)]
    for rung, wider in zip(*ladders, strict=True):
        assert wider.learning_rate == pytest.approx(rung.learning_rate / 8)


def test_a_short_text_makes_small_steps(pruned: ModelSpec) -> None:
    machine = replace(_PLENTY, calibration_blocks=3, models_stay=False)
    choice, _ = choose_ladder("router", pruned, 2, machine, 0)
    assert (choice.rungs[0].blocks_per_step, choice.rungs[0].blocks) == (3, 3)
    assert schedule_of(choice, choice.rungs[0], 2).blocks_per_step == 2


@pytest.mark.parametrize(
    ("limit", "seconds", "most", "steps"),
    [
        (100, [1, 1], [1000, 1000], [50, 50]),
        (100, [1, 1], [10, 1000], [10, 90]),
        (100, [1, 3], [1000, 1000], [50, 16]),
        (100, [1, 1], [5, 6], [5, 6]),
        (1, [10, 10], [7, 7], [1, 1]),
        (60, [2], [100], [30]),
    ],
)
def test_the_time_is_shared_out(limit: float, seconds: list[float], most: list[int], steps: list[int]) -> None:
    assert shared_out(limit, seconds, most) == steps
