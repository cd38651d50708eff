"""Plans of replaced experts: what is refused, how many go for a share, and what a file is described to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from compressors.calibration.statistics import LayerStatistics
from compressors.model.config.reading import read_spec
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.shrink.replace import Replacement, placed, replacement_for, spread
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refuse_unless_held
from exporter.planning.compression import described_compression, expected_spec
from exporter.planning.flags import Flags
from exporter.planning.job import Job
from exporter.planning.plan import Search
from exporter.planning.recipe import CompressChoice
from exporter.planning.recovery import wish_for
from exporter.searching.structures import replacements, replacing, structures_for
from exporter.stages.student.layer_targets import placed_by_statistics


@pytest.fixture(scope="module")
def fine(fine_folder: Path) -> ModelSpec:
    return read_spec(fine_folder)


def _job(**flags: Any) -> Job:
    return Flags(budget="1GB", **{"method": "lightmoe", "formats": "onnx"} | flags).job()


def test_gguf_is_refused_before_any_work_unless_experts_are_written_whole() -> None:
    for formats in ("gguf", "gguf,onnx"):
        with pytest.raises(InputError, match=r"GGUF cannot hold .*--formats onnx, or --materialize"):
            _job(formats=formats)
        assert _job(formats=formats, materialize=True).search.materialize
    assert not _job().search.materialize


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "reap", "materialize": True}, "--materialize is about replaced experts"),
        ({"method": "reap", "remove": "30%"}, "--remove is about replaced experts"),
        ({"remove": "much"}, "--remove: 'much' is not a share"),
        ({"remove": "100%"}, "--remove: '100%' is not a share"),
        ({"remove": "nan"}, "--remove: 'nan' is not a share"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _job(**flags)


def test_a_share_is_a_percentage() -> None:
    assert _job(remove="30%").removed_share == _job(remove=" 30 ").removed_share == 0.3
    assert _job().removed_share is None


def _removed(numbers: Replacement, spec: ModelSpec) -> float:
    """The share of the experts' values that is gone, counted in a description of the layers."""
    n_experts, whole = spec.n_experts, spec.layers[0].expert_parameters
    left = 0
    for layer, bases in zip(spec.layers, spread(numbers, [n_experts] * spec.n_layers), strict=True):
        assert bases is not None
        bases.check_against(n_experts)
        left += (n_experts - len(bases.replaced)) * whole
        left += sum(bases.n_values(*layer.dimensions(tensor)) for tensor in layer.expert_tensors)
    return 1 - left / (spec.n_layers * n_experts * whole)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.84])
def test_no_more_experts_are_replaced_than_a_share_needs(fine: ModelSpec, share: float) -> None:
    numbers = replacement_for(share, fine)
    assert numbers.rank == 8, "the published 16 would be a fifth of these experts"
    assert _removed(numbers, fine) >= share
    fewer = numbers.n_replaced - 1
    if fewer >= 2 * fine.n_layers:
        assert _removed(Replacement(fewer, max(6, fewer // 16), 8), fine) < share


def test_a_share_that_bases_and_adapters_take_is_refused(fine: ModelSpec) -> None:
    with pytest.raises(InputError, match="leave at most 84 % to remove"):
        replacement_for(0.85, fine)
    assert len(list(replacements(fine, 1 / 8))) == 6


def test_a_large_model_gets_the_published_rank(fine: ModelSpec) -> None:
    wide = fine.with_sizes([layer.moe.__class__(32, 1024) for layer in fine.layers])
    assert replacement_for(0.3, wide).rank == 16


def test_naming_the_method_replaces_experts_and_a_share_is_the_only_structure(fine: ModelSpec) -> None:
    search = Search("lightmoe", None, "moe", "auto", "quality", 0)
    structures = structures_for(search, fine)
    assert [choice.apart for choice in structures] == [True] * 6
    assert [choice.replaced for choice in structures] == sorted(choice.replaced or 0 for choice in structures)
    (only,) = structures_for(Search("lightmoe", None, "moe", "auto", "quality", 0, 0.3, True), fine)
    assert only == replacing(0.3, fine, apart=False)


def test_the_containers_see_bases_only_where_they_stay_apart(fine: ModelSpec) -> None:
    choice = replacing(0.5, fine)
    spec = expected_spec(choice, fine)
    found = [layer.bases for layer in spec.layers if layer.bases is not None]
    assert sum(len(bases.replaced) for bases in found) == choice.replaced
    assert sum(bases.n_bases for bases in found) == choice.bases
    with pytest.raises(UnsupportedError, match=r"share a base .*--materialize multiplies them out.*--formats onnx"):
        refuse_unless_held(spec, Container.GGUF)
    whole = expected_spec(choice.model_copy(update={"apart": False}), fine)
    assert whole == fine
    refuse_unless_held(whole, Container.GGUF)
    text = f"{choice.replaced} experts in all on {choice.bases} bases with adapters of rank 8 (lightmoe)"
    assert text in described_compression(choice, fine)


def test_numbers_for_each_layer_are_described_as_they_stand(fine: ModelSpec) -> None:
    by_layer = {"replaced": (0, 30, 31, 28, 28, 29), "bases": (0, 7, 8, 7, 7, 7)}
    choice = CompressChoice.model_validate(
        {"experts": 32, "edit": "lightmoe", "edit_size": 8, "apart": True} | by_layer
    )
    assert CompressChoice.model_validate(yaml.safe_load(yaml.safe_dump(choice.model_dump(mode="json")))) == choice
    layers = expected_spec(choice, fine).layers
    assert layers[0].bases is None
    found = [layer.bases for layer in layers if layer.bases is not None]
    assert tuple(len(bases.replaced) for bases in found) == by_layer["replaced"][1:]
    assert tuple(bases.n_bases for bases in found) == by_layer["bases"][1:]
    assert "146 experts in all on 36 bases" in described_compression(choice, fine)


def test_statistics_place_what_a_recipe_gives_for_all_layers_together() -> None:
    """The layer that turns the states more keeps its experts; what has its place, or replaces none, stays."""
    layers = []
    for cosine in (0.2, 0.98):
        statistics = LayerStatistics.__new__(LayerStatistics)
        statistics.gate_norm_sum_E = statistics.count_E = torch.ones(8, dtype=torch.float64)
        statistics.n_tokens, statistics.moe_cosine_sum = torch.tensor(10.0), torch.tensor(10 * cosine)
        layers.append(statistics)
    choice = CompressChoice(experts=8, edit="lightmoe", edit_size=2, replaced=6, bases=2)
    found = placed_by_statistics(choice, layers)
    assert (found.replaced, found.bases) == ((0, 6), (0, 2))
    assert (found.n_replaced, found.n_bases) == (choice.n_replaced, choice.n_bases) == (6, 2)
    assert placed_by_statistics(found, layers[::-1]) == found
    other = CompressChoice(experts=4, method="reap")
    assert placed_by_statistics(other, layers) == other and other.n_replaced == 0


@pytest.mark.parametrize(
    ("replaced", "bases", "message"),
    [
        ((2, 2), (1, 1), "2 and 2 numbers for 6 layers"),
        ((2, 3, 0, 0, 0, 0), (1, 2, 0, 0, 0, 0), "3 of 32 experts of a layer cannot stand on 2 bases"),
        ((2, 33, 0, 0, 0, 0), (1, 2, 0, 0, 0, 0), "33 of 32 experts of a layer"),
        ((2, 4, 0, 0, 0, 0), (1, 0, 0, 0, 0, 0), "4 of 32 experts of a layer cannot stand on 0 bases"),
        ((2, 0, 0, 0, 0, 0), (1, 1, 0, 0, 0, 0), "0 of 32 experts of a layer cannot stand on 1 bases"),
    ],
)
def test_numbers_of_layers_that_are_not_possible_are_refused(
    fine: ModelSpec, replaced: tuple[int, ...], bases: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        placed(replaced, bases, 8, [fine.n_experts] * fine.n_layers)


def test_layers_of_equal_numbers_store_lists_of_their_own(fine: ModelSpec) -> None:
    """As those of a student do; a graph stores equal lists once, and its size would be predicted too small."""
    layers = placed([16] * 6, [2] * 6, 8, [fine.n_experts] * 6)
    lists = [layer.replaced for layer in layers if layer is not None]
    for layer in layers:
        assert layer is not None
        lists += [tuple(layer.replaced.index(expert) for expert in layer.members(base)) for base in (0, 1)]
    assert len(set(lists)) == 6 + 12


@pytest.mark.parametrize(("edit", "n_bases"), [("svd", 0), ("d2-moe", 1)])
def test_other_factors_may_stay_apart(fine: ModelSpec, edit: str, n_bases: int) -> None:
    choice = CompressChoice.model_validate({"experts": 32, "edit": edit, "edit_size": 4, "apart": True})
    for layer in expected_spec(choice, fine).layers:
        assert layer.bases is not None and (layer.bases.n_bases, layer.bases.rank) == (n_bases, 4)
        assert len(layer.bases.replaced) == 32
    assert wish_for("auto", choice) == "router" and wish_for("auto", replacing(0.3, fine)) == "replaced"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"edit": "lightmoe", "edit_size": 4}, "replaced and bases belong to edit lightmoe"),
        ({"edit": "svd", "edit_size": 4, "replaced": 4, "bases": 1}, "replaced and bases belong to edit lightmoe"),
        ({"edit": "lightmoe", "edit_size": 4, "replaced": (2, 2), "bases": 2}, "replaced and bases must both be one"),
        ({"edit": "mobe", "edit_size": 4, "apart": True}, "apart is for experts of bases and low-rank parts"),
        ({"apart": True}, "apart is for experts of bases and low-rank parts"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CompressChoice.model_validate({"experts": 32, **choice})


def test_recipes_of_other_methods_say_nothing_of_it(fine: ModelSpec) -> None:
    text = yaml.safe_dump(CompressChoice(experts=32).model_dump())
    assert not any(word in text for word in ("replaced", "bases", "apart"))
    choice = replacing(0.3, fine)
    assert CompressChoice.model_validate(choice.model_dump()) == choice
