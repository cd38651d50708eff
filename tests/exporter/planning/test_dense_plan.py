"""Planning a dense student: its one size, its bytes and time, and all that is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressors.calibration.statistics import LayerStatistics
from compressors.model.config.reading import read_spec
from compressors.model.description.spec import MoeSize
from compressors.model.errors import BudgetError, InputError, UnsupportedError
from compressors.model.running.memory import working_bytes
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.opening import open_source
from compressors.shrink.condense import Condense
from compressors.shrink.layerwise import LayerTarget
from compressors.shrink.slim.width import SlimWidth
from exporter.estimating.disk import disk_by_stage
from exporter.estimating.estimate import Speeds, seconds_by_stage
from exporter.estimating.needs import memory_lines
from exporter.planning.compression import check_compression, described_compression, expected_spec
from exporter.planning.job import Flags
from exporter.planning.plan import Plan
from exporter.planning.plan_making import make_plan
from exporter.planning.planner import predict_recipe
from exporter.planning.recipe import CompressChoice, Recipe
from exporter.stages.student.layer_targets import layer_targets
from exporter.writing.gguf.writer import predict_file_size
from exporter.writing.onnx.writer import predict_size
from tests.altered import altered

_GGUF_TYPES = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")
_SPEEDS = Speeds(read_bytes=1e15, multiply_adds=1e6, reference_multiply_adds=1e6, quantized_values=1e15)

Planned = Callable[..., Plan]


@pytest.fixture(scope="module")
def planned(fine_folder: Path, small_texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """The plan of a command line with ``--student dense``; no weight is read."""
    calibration, text = small_texts
    out = tmp_path_factory.mktemp("plan") / "out"

    def plan(budget: str = "1GB", model: Path = fine_folder, **arguments: Any) -> Plan:
        given = {"student": "dense", "budget_kind": "file", "threads": 1} | arguments
        inputs = {"calibration": calibration, "text": text, "out": out}
        return make_plan(Flags(model=str(model), budget=budget, **inputs, **given).job(), "moe-export")

    return plan


@pytest.fixture(scope="module")
def recipe(planned: Planned) -> Recipe:
    """The recipe that the planner chooses with room to spare."""
    return planned(save_student=True).recipe


def _edited(recipe: Recipe, part: str = "compress", **changes: Any) -> Recipe:
    values = recipe.model_dump()
    return Recipe.model_validate(values | {part: values[part] | changes})


@pytest.mark.parametrize("family", ["fine", "coarse"])
def test_the_size_is_given_and_the_bits_fall_with_the_budget(
    planned: Planned, fine_folder: Path, coarse_folder: Path, family: str
) -> None:
    folder = {"fine": fine_folder, "coarse": coarse_folder}[family]
    teacher = read_spec(folder)
    dense = teacher.with_sizes([MoeSize(1, teacher.top_k * teacher.expert_width)] * teacher.n_layers)
    with pytest.raises(BudgetError, match=r"as one dense feed-forward .* works is --budget") as refused:
        planned("400kB", folder, formats="gguf")
    smallest = int(str(refused.value).rsplit("--budget ", 1)[1].removesuffix("B"))
    whole = predict_file_size(dense, open_source(folder), "BF16", folder.name)
    for budget in (whole + 1000, whole // 2, whole // 4, smallest):
        plan = planned(f"{budget}B", folder, formats="gguf")
        assert plan.recipe.compress == CompressChoice(experts=teacher.n_experts, student="dense")
        assert plan.student_spec == dense
        assert 0.97 * budget < plan.predictions["gguf"].file <= budget
    with pytest.raises(BudgetError):
        planned(f"{smallest - 1}B", folder, formats="gguf")
    named = planned("1GB", folder, formats="gguf", quant="Q4_K_M")
    assert named.predictions["gguf"].file == predict_file_size(dense, open_source(folder), "Q4_K_M", folder.name)
    in_onnx = planned("1GB", folder, formats="onnx", quant="Q4_0")
    assert in_onnx.predictions["onnx"].file == predict_size(dense, "Q4_0")


def test_the_recipe_is_predicted_as_it_was_planned(planned: Planned, recipe: Recipe, fine_folder: Path) -> None:
    assert predict_recipe(recipe, open_source(fine_folder)) == planned().predictions
    assert [rung.scope for rung in recipe.recover.rungs] == ["experts"], "there are no routers to teach"
    assert planned(recover="none").recipe.recover.rungs == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"experts": 8}, r"^--experts: a dense student has none; leave --experts out"),
        ({"method": "reap"}, r"^--method: a dense student takes .* which reap does not choose; leave --method out"),
        ({"recover": "router"}, r"^--recover: a dense student has no routers to teach; use auto, experts"),
        ({"recover": "router:published"}, r"^--recover: a dense student has no routers"),
        ({"require": ["routing=0.9"]}, r"^--require: a dense student has no routing to compare"),
        ({"student": "sparse"}, r"^--student: 'sparse' is not known; choose one of moe, dense"),
    ],
)
def test_flags_that_make_no_sense_beside_it_are_refused(planned: Planned, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        planned(**arguments)


def test_a_family_without_a_dense_counterpart_is_refused(planned: Planned, olmoe_folder: Path, recipe: Recipe) -> None:
    said = r"--student dense: no dense architecture matches olmoe .*; there is one for .*mixtral, .*qwen3_moe"
    with pytest.raises(UnsupportedError, match=said):
        planned(model=olmoe_folder)
    with pytest.raises(UnsupportedError, match=said):
        check_compression(_edited(recipe, experts=16), read_spec(olmoe_folder))


@pytest.mark.parametrize(
    ("choice", "fields"),
    [
        ({"method": "reap", "experts": 16}, "compress.method, compress.experts"),
        ({"experts": [32] * 5 + [31]}, "compress.experts"),
        ({"method": "reap"}, "compress.method"),
        ({"drop_moe_layers": 1}, "compress.drop_moe_layers"),
        ({"allocation": "global"}, "compress.allocation"),
        ({"protect_super_experts": True}, "compress.protect_super_experts"),
        ({"edit": "svd", "edit_size": 8}, "compress.edit"),
    ],
)
def test_choices_of_a_recipe_that_do_not_fit_are_named(
    recipe: Recipe, fine_folder: Path, choice: dict[str, Any], fields: str
) -> None:
    with pytest.raises(InputError, match=rf"^{fields}: compress.student is dense, so the 4 best of all 32 experts"):
        check_compression(_edited(recipe, **choice), read_spec(fine_folder))


@pytest.mark.parametrize("part", ["rungs", "after_quantizing"])
def test_recovery_of_routers_is_refused(recipe: Recipe, fine_folder: Path, part: str) -> None:
    rung = {"scope": "router", "blocks": 8, "blocks_per_step": 8, "learning_rate": 0.001}
    changed = _edited(recipe, "recover", **{part: [rung] if part == "rungs" else rung})
    with pytest.raises(InputError, match=r"^recover: compress.student is dense, which leaves no routers to teach"):
        check_compression(changed, read_spec(fine_folder))


def test_fewer_layers_and_narrower_experts_go_with_it(recipe: Recipe, fine_folder: Path) -> None:
    teacher = read_spec(fine_folder)
    changed = _edited(recipe, drop_blocks=2, width=96)
    check_compression(changed, teacher)
    assert expected_spec(changed.compress, teacher) == teacher.with_sizes([MoeSize(1, 4 * 96)] * 4)
    assert described_compression(changed.compress, teacher) == (
        "4 of 6 layers, 4 of 32 experts per layer as one dense feed-forward, 96 of 128 neurons per expert"
    )
    with pytest.raises(InputError, match="GGUF cannot quantize experts that are 40 wide"):
        check_compression(_edited(recipe, width=40), teacher)
    uneven = _edited(recipe, width=[96] * 5 + [64])
    with pytest.raises(UnsupportedError, match="1 experts of width 384, 1 experts of width 256"):
        check_compression(uneven, teacher)
    only_onnx = Recipe.model_validate(uneven.model_dump() | {"gguf": None, "save_student": False})
    check_compression(only_onnx, teacher)


def _no_teacher() -> StreamedModel:
    raise AssertionError("nothing has to be looked at")


def test_layers_are_condensed_after_their_experts_became_narrower(fine_folder: Path) -> None:
    teacher = read_spec(fine_folder)

    statistics = [LayerStatistics.zeros(layer) for layer in teacher.layers]

    def targets(**choice: Any) -> list[LayerTarget]:
        compress = CompressChoice.model_validate({"experts": 32, "student": "dense"} | choice)
        return layer_targets(compress, teacher, statistics, _no_teacher, torch.empty(0, 512))

    assert targets() == [LayerTarget(layer, MoeSize(1, 512), (Condense(),)) for layer in range(6)]
    assert targets(width=64)[0] == LayerTarget(0, MoeSize(1, 256), (SlimWidth(64), Condense()))


def test_no_line_is_for_routers_or_routing(planned: Planned, fine_folder: Path) -> None:
    plan = planned(save_student=True, quant="Q4_0")
    moe = replace(plan, recipe=_edited(plan.recipe, student="moe"))
    dense_stages, moe_stages = disk_by_stage(plan), disk_by_stage(moe)
    dense_lines = dense_stages["student"]
    spec = plan.student_spec
    assert dense_lines["student checkpoint"] == 2 * spec.parameters, "nothing in float32"
    assert dense_lines["changed experts"] == 2 * 6 * 3 * 256 * 512
    figures = 50 * 512 * 64  # of a held-out token beside its routing
    of_teacher = dense_lines["routing"] - figures
    # the student's in torch, and then those of both files, in torch and in their runtimes
    for stage, n_evaluations in (("validate_torch", 1), ("validate_onnx", 5)):
        assert dense_stages[stage]["routing"] == of_teacher + (1 + n_evaluations) * figures
        assert moe_stages[stage]["routing"] == (1 + n_evaluations) * (of_teacher + figures)
    own = dense_stages["onnx"]["statistics"] - moe_stages["onnx"]["statistics"]
    inputs = 4 * 256 + 512  # of attention, its output, gate and up; the output's sum; of the down projection
    assert 6 * 8 * inputs < own < 6 * 8 * (inputs + 20), "and a few sums of one value"
    teacher = plan.teacher_spec
    wide = altered(teacher, top_k=8, hidden_size=2048, expert_width=2048)
    lines = memory_lines(wide, wide.with_sizes([MoeSize(1, 8 * 2048)] * 6), 2)
    more = 4 * 7 * wide.layers[0].expert_parameters
    assert lines["activations and an expert in float32"] == working_bytes(wide) + more
    seconds = [seconds_by_stage(one, _SPEEDS, 10**15)["validate_torch"] for one in (plan, moe)]
    assert seconds[0] == pytest.approx(seconds[1], rel=0.05), "a token meets as many weights as before, but no router"
    assert seconds[0] < seconds[1]
