"""From the recipe's choice to what becomes of each layer; what is impossible is refused before any work, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml

from compressors.calibration.statistics import LayerStatistics, StatisticsCollector
from compressors.model.config.reading import read_spec
from compressors.model.description.routing import GroupScore, Routing
from compressors.model.description.spec import NO_MOE, ModelSpec, MoeSize
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from compressors.shrink.decompose import ActivationSvd, D2Moe, Mobe
from compressors.shrink.drop import block_similarities, moe_similarities, window_similarities
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from compressors.shrink.merge import REAM, HCSMoE, MSMoE
from compressors.shrink.moe_block import Method
from compressors.shrink.prune import Prune
from compressors.shrink.registry import fewest_experts
from compressors.shrink.slim.width import SlimWidth
from exporter.planning.compression import (
    check_compression,
    described_compression,
    expected_spec,
)
from exporter.planning.job import Flags
from exporter.planning.plan_making import make_plan
from exporter.planning.recipe import CompressChoice, Recipe, recipe_yaml
from exporter.stages.student.layer_targets import layer_targets
from exporter.writing.gguf.writer import predict_file_size, write_gguf
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE
from exporter.writing.onnx.writer import predict_size, write_onnx
from tests.altered import with_dense_layers

_N_LAYERS = 6


@pytest.fixture(scope="module")
def teacher(fine_folder: Path) -> ModelSpec:
    """Six layers of 32 experts, top-4, 128 wide."""
    return read_spec(fine_folder)


def _recipe(gguf: str | None = "Q4_0", onnx: str | None = None, save_student: bool = False, **choice: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "source": {"model": "fine"},
            "budget": {"bytes": 10**9, "kind": "file", "context": 512, "kv_type": "f16"},
            "text": {"calibration_blocks": 2, "selection_blocks": 1, "heldout_chunks_per_file": 1},
            "arithmetic": "float32",
            "compress": {"experts": 32} | choice,
            "recover": {"seed": 0},
            "gguf": gguf,
            "onnx": onnx,
            "save_student": save_student,
            "threads": 1,
        }
    )


_ONNX: dict[str, Any] = {"gguf": None, "onnx": "F32"}


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"drop_blocks": 6}, r"compress\.drop_blocks: 6 is not possible for this model; give a number from 0 to 5"),
        ({"drop_moe_layers": 6, **_ONNX}, r"compress\.drop_moe_layers: 6 is not possible .* from 0 to 5"),
        ({"drop_blocks": 2, "drop_moe_layers": 4, **_ONNX}, r"compress\.drop_moe_layers: 4 .* from 0 to 3"),
        ({"method": "reap", "experts": 3}, r"compress\.experts: 3 is not possible .* from 4 to 32"),
        ({"method": "reap", "experts": 33}, r"compress\.experts: 33 is not possible .* from 4 to 32"),
        ({"method": "reap", "experts": [8] * 5 + [3]}, r"compress\.experts: 3 is not possible .* from 4 to 32"),
        ({"method": "reap", "experts": [8] * 5}, r"compress\.experts: 5 numbers for 6 layers with experts; give one"),
        ({"method": "reap", "experts": [8] * 6, "drop_blocks": 1}, r"compress\.experts: 6 numbers for 5 layers"),
        ({"experts": 20}, r"compress\.experts: 20 of 32 experts are to stay, but compress\.method is none: .*reap"),
        ({"width": 129}, r"compress\.width: 129 is not possible .* from 1 to 128"),
        ({"width": [64] * 7}, r"compress\.width: 7 numbers for 6 layers with experts"),
        ({"width": 40}, r"GGUF cannot quantize experts that are 40 wide: give a multiple of 32 up to 128"),
        (
            {"method": "ream", "experts": 16, "allocation": "global", **_ONNX},
            r"compress\.allocation: global needs a criterion .*reap.*; ream chooses within each layer",
        ),
        ({"method": "removal-error", "experts": 16, "allocation": "global", **_ONNX}, r"compress\.allocation"),
        ({"edit": "svd", "edit_size": 129}, r"compress\.edit_size: 129 is not possible .* from 1 to 128"),
        ({"edit": "svd", "edit_size": 65, "width": 64}, r"compress\.edit_size: 65 is not possible .* from 1 to 64"),
        ({"edit": "mobe", "edit_size": 33}, r"compress\.edit_size: 33 is not possible .* from 1 to 32"),
        (
            {"edit": "mobe", "edit_size": 9, "method": "reap", "experts": [9, 8, 9, 9, 9, 9], **_ONNX},
            r"compress\.edit_size: 9 is not possible .* from 1 to 8",
        ),
    ],
)
def test_impossible_numbers_are_refused_by_field(teacher: ModelSpec, choice: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_compression(_recipe(**choice), teacher)


_UNEVEN: list[tuple[dict[str, Any], str]] = [
    ({"drop_moe_layers": 1}, "32 experts of width 128, no experts"),
    ({"method": "reap", "experts": [8, 8, 8, 8, 8, 9]}, "8 experts of width 128, 9 experts of width 128"),
    ({"method": "reap", "experts": 16, "allocation": "global"}, "17 experts of width 128, 15 experts of width 128"),
    ({"width": [64, 64, 64, 96, 96, 96]}, "32 experts of width 64, 32 experts of width 96"),
]


@pytest.mark.parametrize(("choice", "sizes"), _UNEVEN)
def test_layers_that_differ_are_refused_where_they_cannot_be_held(
    teacher: ModelSpec, choice: dict[str, Any], sizes: str
) -> None:
    with pytest.raises(UnsupportedError, match=rf"qwen3moe graph .* layers have {sizes}.*use --formats onnx"):
        check_compression(_recipe(**choice), teacher)
    with pytest.raises(UnsupportedError, match=rf"these have {sizes}.*, which transformers could not load"):
        check_compression(_recipe(save_student=True, **choice, **_ONNX), teacher)
    check_compression(_recipe(**choice, **_ONNX), teacher)


@pytest.mark.parametrize(
    "choice",
    [
        {"drop_blocks": 5, "consecutive_blocks": True, "method": "reap", "experts": 4, "width": 32},
        {"method": "reap", "experts": 32},
        {"method": "reap", "experts": 4, "allocation": "global"},  # nothing to distribute
        {"method": "reap", "experts": [8] * 6, "width": [64] * 6},
        {"edit": "mobe", "edit_size": 32},
        {"edit": "svd", "edit_size": 128},
        {"width": 40, **_ONNX},
        {"method": "m-smoe", "experts": 4, "sequential": True},
    ],
)
def test_what_is_possible_is_not_refused(teacher: ModelSpec, choice: dict[str, Any]) -> None:
    check_compression(_recipe(save_student=True, **choice), teacher)


def test_ream_needs_groups_enough(teacher: ModelSpec) -> None:
    many = teacher.with_experts(100)
    with pytest.raises(InputError, match=r"compress\.experts: 6 is not possible .* from 7 to 100"):
        check_compression(_recipe(method="ream", experts=6), many)
    check_compression(_recipe(method="ream", experts=7), many)
    check_compression(_recipe(method="reap", experts=6), many)


@pytest.mark.parametrize(
    ("choice", "said", "kind"),
    [
        ({"drop_moe_layers": 1}, "no experts: they cannot be written as GGUF", UnsupportedError),
        ({"method": "reap", "experts": [8, 9]}, "8 experts of width 128, 9 experts", UnsupportedError),
        ({"width": 40}, "GGUF cannot quantize experts that are 40 wide", InputError),
        ({"width": 40, "gguf": None, "onnx": "Q4_0"}, "rows of 40 values.*these encodings fit: F32", UnsupportedError),
        ({"drop_moe_layers": 1, **_ONNX, "save_student": True}, "transformers could not load", UnsupportedError),
    ],
)
def test_a_recipe_is_refused_before_any_work(
    toy_model: Path,
    small_texts: tuple[Path, Path],
    tmp_path: Path,
    choice: dict[str, Any],
    said: str,
    kind: type[Exception],
) -> None:
    """The plan refuses them, before anything is written."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(_recipe(**choice)))
    calibration, text = small_texts
    job = Flags(model=str(toy_model), recipe=path, calibration=calibration, text=text, out=tmp_path / "out").job()
    with pytest.raises(kind, match=said):
        make_plan(job, "moe-export")
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_with_a_list_of_counts_is_planned(
    toy_model: Path, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(_recipe(method="reap", experts=[9, 5], **_ONNX)))
    assert yaml.safe_load(path.read_text())["compress"]["experts"] == [9, 5]
    calibration, text = small_texts
    job = Flags(model=str(toy_model), recipe=path, calibration=calibration, text=text, out=tmp_path / "out").job()
    plan = make_plan(job, "moe-export")
    assert plan.recipe.compress.experts == (9, 5)
    assert [layer.moe for layer in plan.student_spec.layers] == [MoeSize(9, 128), MoeSize(5, 128)]
    assert plan.predictions["onnx"].file == predict_size(plan.student_spec, "F32")


def test_layers_that_never_had_experts_stay_as_they_are(teacher: ModelSpec) -> None:
    dense = with_dense_layers(teacher, 2)
    spec = expected_spec(
        CompressChoice(drop_blocks=1, drop_moe_layers=1, method="reap", experts=(9, 8), width=96), dense
    )
    assert [layer.moe for layer in spec.layers] == [NO_MOE, NO_MOE, MoeSize(9, 96), MoeSize(8, 96), NO_MOE]
    assert [layer.feed_forward is None for layer in spec.layers] == [False, False, False, False, True]
    assert spec.layers[:2] == dense.layers[:2]


def test_layers_that_never_had_experts_count_for_nothing(teacher: ModelSpec) -> None:
    dense = with_dense_layers(teacher, 2)
    check_compression(_recipe(drop_blocks=3), dense)
    with pytest.raises(InputError, match=r"compress\.drop_blocks: 4 is not possible .* from 0 to 3"):
        check_compression(_recipe(drop_blocks=4), dense)
    with pytest.raises(InputError, match="3 numbers for 4 layers with experts"):
        check_compression(_recipe(method="reap", experts=[9, 9, 9]), dense)


def test_groups_of_experts_stay_equally_large(teacher: ModelSpec) -> None:
    grouped = _grouped(teacher, 8)
    assert fewest_experts("reap", grouped) == 16  # two in each group, whose sum decides
    check_compression(_recipe(method="reap", experts=24), grouped)
    for choice in ({"experts": 20}, {"experts": 24, "allocation": "global"}):
        with pytest.raises(InputError, match=r"choose among 8 groups of experts.*give a multiple of 8"):
            check_compression(_recipe(method="reap", **choice), grouped)


def _grouped(spec: ModelSpec, n_groups: int) -> ModelSpec:
    routing = Routing(n_groups=n_groups, n_chosen_groups=2, group_score=GroupScore.BEST_TWO)
    layers = [
        replace(layer, feed_forward=replace(layer.routed, routing=routing)) for layer in spec.layers if layer.routed
    ]
    return replace(spec, layers=tuple(layers))


def test_compression_is_described(teacher: ModelSpec) -> None:
    def described(**choice: Any) -> str:
        return described_compression(CompressChoice.model_validate({"experts": 32} | choice), teacher)

    assert described() == "32 of 32 experts per layer"
    assert described(method="reap", experts=20) == "20 of 32 experts per layer (reap)"
    assert described(drop_blocks=2, drop_moe_layers=1, method="reap", experts=[9, 8, 7]) == (
        "4 of 6 layers, experts in 3 of 4 layers, 9, 8, 7 of 32 experts per layer (reap)"
    )
    assert described(width=96, edit="svd", edit_size=16) == (
        "32 of 32 experts per layer, 96 of 128 neurons per expert, svd of size 16"
    )


@pytest.fixture(scope="module")
def text_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(heldout_tokens[: 4 * 128].reshape(4, 128))


@pytest.fixture(scope="module")
def statistics(fine_folder: Path, text_BT: torch.Tensor) -> list[LayerStatistics]:
    collector = StatisticsCollector(read_spec(fine_folder))
    _teacher_model(fine_folder).stream([TokenGroup(text_BT, [collector.observe])])
    return [collector.take(layer) for layer in range(_N_LAYERS)]


def _teacher_model(folder: Path) -> StreamedModel:
    return StreamedModel(Student.teacher(open_source(folder)))


@pytest.fixture(scope="module")
def targets_of(
    fine_folder: Path, teacher: ModelSpec, statistics: list[LayerStatistics], text_BT: torch.Tensor
) -> Callable[..., list[LayerTarget]]:
    def targets(**choice: Any) -> list[LayerTarget]:
        compress = CompressChoice.model_validate({"experts": 32} | choice)
        return layer_targets(compress, teacher, statistics, lambda: _teacher_model(fine_folder), text_BT)

    return targets


def _by_value(values: torch.Tensor, layers: Sequence[int]) -> list[int]:
    return sorted(layers, key=lambda layer: -float(values[layer]))


def test_blocks_that_change_least_go_and_then_moe_sub_layers(
    targets_of: Callable[..., list[LayerTarget]], statistics: list[LayerStatistics]
) -> None:
    without_blocks = sorted(_by_value(block_similarities(statistics), range(_N_LAYERS))[2:])
    targets = targets_of(drop_blocks=2)
    assert targets == [LayerTarget(layer, MoeSize(32, 128)) for layer in without_blocks]
    targets = targets_of(drop_blocks=2, drop_moe_layers=1, method="reap", experts=[6, 7, 8])
    (without_experts,) = _by_value(moe_similarities(statistics), without_blocks)[:1]
    counts = iter((6, 7, 8))
    assert targets == [
        LayerTarget(layer, NO_MOE)
        if layer == without_experts
        else LayerTarget(layer, MoeSize(count := next(counts), 128), (Prune("reap", count),))
        for layer in without_blocks
    ]


def test_layers_that_never_had_experts_are_neither_dropped_nor_changed(
    teacher: ModelSpec, fine_folder: Path, statistics: list[LayerStatistics], text_BT: torch.Tensor
) -> None:
    """Layer 0 would be the first to go, as the one that changes the states least."""
    first = replace(statistics[0], block_cosine_sum=statistics[0].n_tokens, moe_cosine_sum=statistics[0].n_tokens)
    dense, seen = with_dense_layers(teacher, 1), [first, *statistics[1:]]
    for consecutive_blocks in (False, True):
        choice = CompressChoice(
            experts=9, method="reap", drop_blocks=1, drop_moe_layers=1, consecutive_blocks=consecutive_blocks
        )
        targets = layer_targets(choice, dense, seen, lambda: _teacher_model(fine_folder), text_BT)
        assert targets[0] == LayerTarget(0, NO_MOE)
        assert len(targets) == _N_LAYERS - 1
        assert [target.size for target in targets[1:]].count(NO_MOE) == 1
        assert [target.size for target in targets[1:]].count(MoeSize(9, 128)) == 3


def test_neighbouring_blocks_go_together(
    targets_of: Callable[..., list[LayerTarget]], fine_folder: Path, text_BT: torch.Tensor
) -> None:
    for n_dropped in (2, 5):
        scores = window_similarities(_teacher_model(fine_folder), text_BT, n_dropped)
        first = _by_value(scores, range(len(scores)))[0]
        left = [layer for layer in range(_N_LAYERS) if not first <= layer < first + n_dropped]
        targets = targets_of(drop_blocks=n_dropped, consecutive_blocks=True)
        assert [target.source for target in targets] == left


@pytest.mark.parametrize(
    ("choice", "methods"),
    [
        ({}, ()),
        ({"method": "man", "experts": 9}, (Prune("man", 9),)),
        ({"method": "m-smoe", "experts": 9}, (MSMoE(9),)),
        ({"method": "hc-smoe", "experts": 9}, (HCSMoE(9),)),
        ({"method": "ream", "experts": 9, "width": 64}, (REAM(9), SlimWidth(64))),
        ({"method": "ream", "experts": 32, "width": 128}, ()),
        ({"edit": "svd", "edit_size": 9}, (ActivationSvd(9),)),
        ({"edit": "d2-moe", "edit_size": 9}, (D2Moe(9),)),
        (
            {"method": "reap", "experts": 9, "width": 96, "edit": "mobe", "edit_size": 3},
            (Prune("reap", 9), SlimWidth(96), Mobe(3)),
        ),
    ],
)
def test_methods_are_applied_in_their_order(
    targets_of: Callable[..., list[LayerTarget]], choice: dict[str, Any], methods: tuple[Method, ...]
) -> None:
    targets = targets_of(**choice)
    assert [target.source for target in targets] == list(range(_N_LAYERS))
    assert {target.methods for target in targets} == {methods}
    assert {target.size for target in targets} == {MoeSize(choice.get("experts", 32), choice.get("width") or 128)}


def test_super_experts_are_protected(
    fine_folder: Path, teacher: ModelSpec, statistics: list[LayerStatistics], text_BT: torch.Tensor
) -> None:
    """This model has none; so an outlier is put into layer 2, which is layer 1 of what is left."""
    outlier = statistics[2].output_max_E.index_fill(0, torch.tensor([7]), 1e4)
    sums = [*statistics[:2], replace(statistics[2], output_max_E=outlier), *statistics[3:]]
    protected = [frozenset({7}) if layer == 2 else frozenset[int]() for layer in range(_N_LAYERS)]
    for protect, expected in ((True, protected), (False, [frozenset[int]()] * _N_LAYERS)):
        choice = CompressChoice(method="reap", experts=9, drop_blocks=1, protect_super_experts=protect)
        targets = layer_targets(choice, teacher, sums, lambda: _teacher_model(fine_folder), text_BT)
        assert 2 in [target.source for target in targets]
        assert [target.methods for target in targets] == [
            (Prune("reap", 9, expected[target.source]),) for target in targets
        ]


@pytest.mark.parametrize("method", ["frequency", "reap"])
def test_global_allocation_keeps_the_mean_and_weighs_layers_alike(
    targets_of: Callable[..., list[LayerTarget]], statistics: list[LayerStatistics], method: str
) -> None:
    """By definition the lowest shares of all layers go, of equal ones the last, and no layer falls below top-k."""
    counts = [target.size.n_experts for target in targets_of(method=method, experts=16, allocation="global")]
    shares = []
    for layer, sums in enumerate(statistics):
        scores = sums.count_E if method == "frequency" else sums.reap_scores()
        shares += [(float(score / scores.sum()), -layer) for score in scores]
    expected, dropped = [32] * _N_LAYERS, 0
    for _, minus_layer in sorted(shares):
        if dropped < 16 * _N_LAYERS and expected[-minus_layer] > 4:
            expected[-minus_layer] -= 1
            dropped += 1
    assert sum(counts) == 16 * _N_LAYERS
    assert counts == expected
    assert len(set(counts)) > 1


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"method": "reap", "experts": 9},
        {"width": 64},
        {"drop_blocks": 4},
        {"drop_blocks": 4, "method": "ream", "experts": 5, "width": 32},
    ],
)
def test_bytes_of_students_whose_layers_are_alike_are_predicted_exactly(
    fine_folder: Path,
    teacher: ModelSpec,
    statistics: list[LayerStatistics],
    text_BT: torch.Tensor,
    targets_of: Callable[..., list[LayerTarget]],
    tmp_path: Path,
    choice: dict[str, Any],
) -> None:
    source = open_source(fine_folder)
    run = LayerwiseCompression(source, targets_of(**choice), statistics, text_BT, n_sample_blocks=4).run()
    layers = list(run)
    overlay = {name: tensor for layer in layers for name, tensor in layer.overlay.items()}
    student = Student(source, ExpertMap(32, tuple(layer.map for layer in layers))).with_overlay(overlay)
    spec = expected_spec(CompressChoice.model_validate({"experts": 32} | choice), teacher)
    assert student.spec == spec
    write_gguf(student, "Q4_0", tmp_path / "x.gguf", name="fine", threads=1)
    assert (tmp_path / "x.gguf").stat().st_size == predict_file_size(spec, source, "Q4_0", "fine")
    write_onnx(student, "Q4_0", tmp_path / "onnx", threads=1)
    written = sum((tmp_path / "onnx" / name).stat().st_size for name in (MODEL_FILE, DATA_FILE))
    assert written == predict_size(spec, "Q4_0")


@pytest.mark.parametrize("choice", [choice for choice, _ in _UNEVEN])
def test_bytes_of_students_whose_layers_differ_are_predicted_up_to_padding(
    teacher: ModelSpec, targets_of: Callable[..., list[LayerTarget]], choice: dict[str, Any]
) -> None:
    targets = targets_of(**choice)
    written = predict_size(teacher.with_sizes([target.size for target in targets]), "Q4_0")
    predicted = predict_size(expected_spec(CompressChoice.model_validate({"experts": 32} | choice), teacher), "Q4_0")
    assert abs(written - predicted) <= 4 * 4096 * _N_LAYERS
