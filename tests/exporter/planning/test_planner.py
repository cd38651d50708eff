"""The planner on the bundled model: against every number of experts, and by what its choices must hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from compressors.calibration.splits import Splits, read_splits
from compressors.model.description.spec import NO_MOE, ModelSpec, MoeSize
from compressors.model.errors import BudgetError, InputError, UnsupportedError
from compressors.model.sources.opening import open_source
from compressors.shrink.registry import fewest_experts
from exporter.estimating.budget import predict
from exporter.estimating.prediction import Prediction
from exporter.planning.job import Flags
from exporter.planning.planner import TextCounts, choose_recipe, predict_recipe
from exporter.planning.recipe import BudgetChoice, CompressChoice, FileChoice, Recipe
from exporter.writing.gguf.writer import predict_file_size
from exporter.writing.onnx.writer import predict_size

_MODEL = Path(__file__).parents[3] / "exporter" / "demo" / "model"
_GGUF_TYPES = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")
_ONNX_TYPES = ("F32", "Q4_0")
_MEMORY = 8_000_000_000  # enough to train all experts of the bundled model
_COUNTS = TextCounts(calibration=500, selection=60, heldout_files=5)


@pytest.fixture(scope="module")
def splits(small_texts: tuple[Path, Path]) -> Splits:
    return read_splits(*small_texts)


def _scopes(recipe: Recipe) -> list[str]:
    return [rung.scope for rung in recipe.recover.rungs]


class Planner:
    """The planner on the bundled model, called as the command line would."""

    def __init__(self, splits: Splits) -> None:
        self._splits = splits
        self.checkpoint = open_source(_MODEL)

    def __call__(
        self, budget: int, counts: TextCounts = _COUNTS, **arguments: Any
    ) -> tuple[Recipe, dict[str, Prediction]]:
        job = Flags(budget=f"{budget}B", threads=1, **{"budget_kind": "file", **arguments}).job()
        recipe, predictions, _ = choose_recipe(job, self.checkpoint, "tiny", self._splits, counts, _MEMORY)
        return recipe, predictions


@pytest.fixture(scope="module")
def plan(splits: Splits) -> Planner:
    return Planner(splits)


@cache
def _file_bytes(artifact: str, n_experts: int, mix: str) -> int:
    source = open_source(_MODEL)
    spec = source.spec.with_experts(n_experts)
    if artifact == "gguf":
        return predict_file_size(spec, source, mix, "tiny")
    return predict_size(spec, mix)


_ONNX = {"BF16": "F32", "Q8_0": "Q4_0", "Q2_K": "Q4_0"}
"""The preset that stands in for a mix; with the mix the sizes of the files cross."""


def _most_experts(budget: int, mixes: dict[str, str]) -> int | None:
    """Finds it by trying every number."""
    fitting = (
        n_experts
        for n_experts in range(32, 3, -1)
        if all(_file_bytes(artifact, n_experts, mix) <= budget for artifact, mix in mixes.items())
    )
    return next(fitting, None)


def _budgets(mixes: dict[str, str]) -> Iterator[int]:
    """Even steps, and places where one byte must make a difference."""
    yield from range(3_000_000, 90_000_000, 7_000_000)
    for artifact, mix in mixes.items():
        for n_experts in (32, 31, 4):
            exact = _file_bytes(artifact, n_experts, mix)
            yield from (exact, exact - 1)


@pytest.mark.parametrize("quant", sorted(_ONNX))
@pytest.mark.parametrize("artifacts", [("gguf",), ("onnx",), ("gguf", "onnx")])
def test_a_named_mix_keeps_as_many_experts_as_fit(plan: Planner, artifacts: tuple[str, ...], quant: str) -> None:
    outcomes = set()
    mixes = {artifact: quant if artifact == "gguf" else _ONNX[quant] for artifact in artifacts}
    for budget in _budgets(mixes):
        expected = _most_experts(budget, mixes)
        if expected is None:
            with pytest.raises(BudgetError):
                plan(budget, formats=",".join(artifacts), quant=quant)
            continue
        recipe, predictions = plan(budget, formats=",".join(artifacts), quant=quant)
        assert recipe.compress.experts == expected, budget
        assert {artifact: recipe.file(artifact).mix for artifact in recipe.artifacts} == mixes
        assert not any(recipe.file(artifact).tensors for artifact in artifacts)
        for artifact, prediction in predictions.items():
            assert prediction.file == _file_bytes(artifact, expected, mixes[artifact]) <= budget
        outcomes.add(expected)
    assert {32, 4} <= outcomes, "both ends were reached"


_WAYS: dict[str, list[dict[str, Any]]] = {
    "frequency": [{"method": "frequency", "experts": n_experts} for n_experts in range(31, 3, -1)],
    "ream": [{"method": "ream", "experts": n_experts, "sequential": True} for n_experts in range(31, 3, -1)],
    "hc-smoe": [{"method": "hc-smoe", "experts": n_experts} for n_experts in range(31, 3, -1)],
    "slim": [{"width": width} for width in (96, 64, 32)],
    "block-drop": [{"drop_blocks": n_blocks} for n_blocks in range(1, 6)],
    "layer-drop": [{"drop_moe_layers": n_layers} for n_layers in range(1, 6)],
}
"""The results that each method may have for the bundled model, from the smallest change."""


def _spec_by_hand(way: dict[str, Any]) -> ModelSpec:
    """The same for every layer that is left; MoE sub-layers go from the end."""
    teacher = open_source(_MODEL).spec
    n_without = way.get("drop_moe_layers", 0)
    size = MoeSize(way.get("experts", 32), way.get("width", 128))
    return teacher.with_sizes([size] * (6 - way.get("drop_blocks", 0) - n_without) + [NO_MOE] * n_without)


def _bytes_of(artifact: str, way: dict[str, Any], weight_type: str) -> int:
    shape = _spec_by_hand(way)
    return (
        predict_file_size(shape, open_source(_MODEL), weight_type, "tiny")
        if artifact == "gguf"
        else predict_size(shape, weight_type)
    )


@pytest.mark.parametrize(
    ("method", "artifacts"),
    [
        *((method, ("onnx",)) for method in sorted(_WAYS)),
        *((method, ("gguf", "onnx")) for method in sorted(_WAYS) if method != "layer-drop"),
    ],
)
def test_each_method_takes_the_least_away_that_fits(plan: Planner, method: str, artifacts: tuple[str, ...]) -> None:
    """Budgets at which a way just fits with the named mix, and one byte less."""
    ways = [{}, *_WAYS[method]]
    smallest = [max(_bytes_of(name, way, "Q4_0") for name in artifacts) for way in ways]
    assert smallest == sorted(smallest, reverse=True)
    choices = {"method": method, "formats": ",".join(artifacts), "quant": "Q4_0"}
    for position in {1, 2, len(ways) // 2, len(ways) - 1}:
        for budget, expected in ((smallest[position], position), (smallest[position] - 1, position + 1)):
            if expected == len(ways):
                with pytest.raises(BudgetError, match=f"works is --budget {smallest[-1]}B"):
                    plan(budget, **choices)
                continue
            recipe, predictions = plan(budget, **choices)
            assert recipe.compress == CompressChoice(**{"experts": 32} | ways[expected])
            assert _scopes(recipe) == (["all"] if "width" in ways[expected] else ["router", "experts"])
            for name in artifacts:
                assert predictions[name].file == _bytes_of(name, ways[expected], "Q4_0")


@pytest.mark.parametrize("method", sorted(_WAYS))
def test_with_room_to_spare_no_method_takes_anything_away(plan: Planner, method: str) -> None:
    recipe, _ = plan(1_000_000_000, method=method)
    assert recipe.compress == CompressChoice(experts=32)
    assert _scopes(recipe) == []


def test_layer_drop_is_refused_with_gguf(plan: Planner) -> None:
    with pytest.raises(UnsupportedError, match=r"32 experts of width 128, no experts: .*--formats onnx"):
        plan(_bytes_of("gguf", {}, "Q4_0") - 1, method="layer-drop", formats="gguf", quant="Q4_0")


@pytest.mark.parametrize("method", ["slim", "block-drop", "layer-drop"])
def test_methods_that_keep_all_experts_refuse_a_number_of_them(plan: Planner, method: str) -> None:
    with pytest.raises(InputError, match=rf"--experts: --method {method} keeps all experts"):
        plan(1_000_000_000, method=method, experts=20)


def test_ream_keeps_as_many_experts_as_its_groups_need(plan: Planner) -> None:
    """Groups of 16 at most: 32 experts need 2 of them, less than the 4 that a token uses; 256 would need 16."""
    spec = plan.checkpoint.spec
    assert fewest_experts("ream", spec) == fewest_experts("reap", spec) == 4
    assert fewest_experts("ream", spec.with_experts(256)) == 16
    assert fewest_experts("ream", spec.with_experts(257)) == 17


def _is_whole(recipe: Recipe) -> bool:
    return recipe.compress == CompressChoice(experts=32)


@pytest.mark.parametrize("artifact", ["gguf", "onnx"])
def test_falling_budgets_never_give_more(plan: Planner, artifact: str) -> None:
    """First bits go, then width or experts, and what is expected of the file never gets better."""
    was_whole, structures = True, set()
    for budget in (30_000_000, 15_000_000, 9_000_000, 6_000_000, 4_000_000, 2_500_000, 1_500_000):
        try:
            recipe, predictions = plan(budget, formats=artifact)
        except BudgetError:
            break
        assert predictions[artifact].file <= budget
        assert predictions[artifact].file > 0.9 * budget or not _is_whole(recipe), "a file fills its budget"
        assert was_whole or not _is_whole(recipe)
        assert _scopes(recipe) in ([[]] if _is_whole(recipe) else [["router", "experts"], ["all"]]), (
            "who shrinks recovers"
        )
        was_whole = _is_whole(recipe)
        structures.add(recipe.compress)
    assert len(structures) > 2


def test_with_room_to_spare_the_numbers_stay_as_they_are(plan: Planner) -> None:
    recipe, _ = plan(1_000_000_000)
    assert _is_whole(recipe)
    assert set(recipe.file("gguf").tensors.values()) == {"BF16"}
    assert set(recipe.file("onnx").tensors.values()) == {"F32"}
    assert _scopes(recipe) == []


def test_bits_go_before_experts(plan: Planner) -> None:
    """Down to 17 % of the size in 16 bits."""
    recipe, predictions = plan(7_200_000, formats="gguf")
    assert _is_whole(recipe)
    assert predictions["gguf"].file <= 7_200_000
    types = recipe.file("gguf").tensors
    assert len(set(types.values())) > 2, "tensors differ"
    assert types["token_embd.weight"][:2] in ("Q8", "Q6", "Q5"), "the embedding matters most"
    assert not _is_whole(plan(4_000_000, formats="gguf")[0])


def test_pinned_experts_are_obeyed_and_the_budget_still_holds(plan: Planner) -> None:
    recipe, predictions = plan(8_000_000, experts=20)
    assert (recipe.compress.experts, recipe.compress.method) == (20, "reap")
    assert max(prediction.file for prediction in predictions.values()) <= 8_000_000
    with pytest.raises(BudgetError, match=r"with 20 of 32 experts per layer \(reap\)"):
        plan(2_000_000, experts=20, formats="gguf")


@pytest.mark.parametrize("experts", [3, 33, 99])
def test_pinned_experts_stay_between_top_k_and_all(plan: Planner, experts: int) -> None:
    with pytest.raises(InputError, match=rf"--experts: {experts} experts cannot be kept.*from 4 to 32"):
        plan(1_000_000_000, experts=experts)


@pytest.mark.parametrize(
    ("quant", "onnx"), [("F32", "F32"), ("BF16", "F32"), ("Q8_0", "Q4_0"), ("Q5_1", "Q4_0"), ("Q4_0", "Q4_0")]
)
def test_a_pinned_type_is_obeyed(plan: Planner, quant: str, onnx: str) -> None:
    recipe, _ = plan(1_000_000_000, quant=quant)
    assert (recipe.file("gguf").mix, recipe.file("onnx").mix, recipe.compress.experts) == (quant, onnx, 32)


def test_a_pinned_type_that_does_not_fit_costs_experts(plan: Planner) -> None:
    budget = _file_bytes("gguf", 23, "Q8_0")
    recipe, _ = plan(budget, quant="Q8_0", formats="gguf")
    assert (recipe.file("gguf").mix, recipe.compress.experts) == ("Q8_0", 23)


@pytest.mark.parametrize("kind", ["file", "total"])
@pytest.mark.parametrize(
    "pins",
    [{}, {"formats": "gguf"}, {"formats": "onnx"}, {"experts": 20}, {"quant": "Q8_0"}, {"experts": 9, "quant": "F32"}],
)
def test_the_budget_that_an_error_names_works_and_nothing_less(plan: Planner, kind: str, pins: dict[str, Any]) -> None:
    with pytest.raises(BudgetError) as refused:
        plan(500_000, budget_kind=kind, **pins)
    assert refused.value.exit_code == 3
    smallest = int(str(refused.value).rsplit("--budget ", 1)[1].removesuffix("B"))
    recipe, predictions = plan(smallest, budget_kind=kind, **pins)
    assert recipe.compress.experts == pins.get("experts", 4), "down to top-k, not below"
    assert max(prediction.counted(kind) for prediction in predictions.values()) == smallest
    with pytest.raises(BudgetError):
        plan(smallest - 1, budget_kind=kind, **pins)


def test_the_total_counts_what_the_runtime_needs(plan: Planner) -> None:
    budget = BudgetChoice(bytes=1, kind="total", context=2048, kv_type="f16")
    needed = predict("gguf", plan.checkpoint, "tiny", plan.checkpoint.spec, FileChoice(mix="Q8_0"), budget, 1)
    assert needed.total > needed.file
    recipe, predictions = plan(needed.total, budget_kind="total", formats="gguf", quant="Q8_0")
    assert (recipe.file("gguf").mix, recipe.compress.experts) == ("Q8_0", 32)
    assert predictions["gguf"] == needed
    assert plan(needed.total - 1, budget_kind="total", formats="gguf", quant="Q8_0")[0].compress.experts == 31
    searched = plan(needed.total, budget_kind="total", formats="gguf")[1]["gguf"]
    assert 0.98 * needed.total < searched.total <= needed.total


def test_a_longer_context_leaves_less_for_weights(plan: Planner) -> None:
    """The cache has 2 x 6 layers x 4 heads x 32 values of 2 bytes per token: 3072 bytes."""
    short, long = (plan(1_000_000_000, context=n, formats="gguf")[1]["gguf"].kv_cache for n in (512, 2048))
    assert long - short == 1536 * 3072


def test_the_context_is_at_most_the_model_s(plan: Planner) -> None:
    assert plan(1_000_000_000, context=100_000)[0].budget.context == 2048
    assert plan(1_000_000_000, context=512)[0].budget.context == 512


def test_a_recipe_is_predicted_as_it_was_planned(plan: Planner) -> None:
    recipe, predictions = plan(9_000_000)
    assert predict_recipe(recipe, plan.checkpoint) == predictions


def _edited(recipe: Recipe, **values: Any) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(), **values})


def test_an_edited_recipe_must_still_fit(plan: Planner) -> None:
    recipe, _ = plan(9_000_000, formats="gguf")
    with pytest.raises(BudgetError, match=r"gguf in BF16 needs 42\.5 MB .* budget of 9\.0 MB"):
        predict_recipe(_edited(recipe, gguf="BF16", compress={"method": "none", "experts": 32}), plan.checkpoint)
    for experts in (3, 33):
        with pytest.raises(InputError, match=rf"compress\.experts: {experts} is not possible.* from 4 to 32"):
            predict_recipe(_edited(recipe, compress={"method": "reap", "experts": experts}), plan.checkpoint)
    with pytest.raises(InputError, match="Q3_X"):
        predict_recipe(_edited(recipe, gguf="Q3_X"), plan.checkpoint)
    with pytest.raises(InputError, match="Q8_0"):
        predict_recipe(_edited(recipe, onnx="Q8_0"), plan.checkpoint)


@pytest.mark.parametrize(
    ("recover", "experts", "scopes"),
    [
        ("auto", 32, []),
        ("auto", 31, ["router", "experts"]),
        ("none", 20, []),
        ("router", 32, ["router"]),
        ("router:published", 20, ["router"]),
        ("adapters:next-token", 20, ["adapters"]),
    ],
)
def test_recovery_follows_pruning_or_the_flag(plan: Planner, recover: str, experts: int, scopes: list[str]) -> None:
    recipe, _ = plan(1_000_000_000, recover=recover, experts=experts, seed=7)
    assert _scopes(recipe) == scopes
    assert recipe.recover.seed == 7
    assert {rung.blocks for rung in recipe.recover.rungs} <= {500 if "published" in recover else 320}


def test_the_published_schedule_is_the_paper_s(plan: Planner) -> None:
    many = replace(_COUNTS, calibration=10_000)
    recipe, _ = plan(1_000_000_000, counts=many, recover="router:published", experts=20)
    (rung,) = recipe.recover.rungs
    assert (rung.blocks, rung.blocks_per_step, rung.learning_rate) == (3000, 8, 5e-5)
    assert recipe.text.calibration_blocks == 3000


def test_no_more_text_is_planned_than_there_is(plan: Planner) -> None:
    recipe, _ = plan(5_000_000, counts=TextCounts(calibration=11, selection=2, heldout_files=60))
    assert (recipe.text.calibration_blocks, recipe.text.selection_blocks) == (11, 2)
    assert recipe.text.heldout_chunks_per_file == 1
    assert {rung.blocks for rung in recipe.recover.rungs} == {11}
    recipe, _ = plan(5_000_000)
    text = recipe.text
    assert (text.calibration_blocks, text.selection_blocks, text.heldout_chunks_per_file) == (320, 20, 10)


def test_the_recipe_names_model_and_texts(plan: Planner, splits: Splits) -> None:
    recipe, _ = plan(5_000_000, save_student=True)
    assert recipe.source.identity == plan.checkpoint.identity()
    assert (recipe.source.model, recipe.save_student, recipe.threads) == ("tiny", True, 1)
    assert recipe.text.calibration_sha256 == splits.calibration.sha256
    assert recipe.text.selection_sha256 == splits.selection.sha256
    assert recipe.text.heldout_sha256 == splits.heldout.sha256
