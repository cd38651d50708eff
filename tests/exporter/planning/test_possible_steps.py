"""The steps that are possible for a model, and what can hold their results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compressors.model.config.reading import read_spec
from compressors.model.description.routing import Routing
from compressors.model.description.spec import ModelSpec
from exporter.capabilities.rules import Container
from exporter.planning.possible_steps import STEPS, Step, refusals
from tests.altered import altered


def _step(name: str) -> Step:
    (step,) = (step for step in STEPS if step.name == name)
    return step


def _holders(name: str, spec: ModelSpec) -> list[str]:
    return [container.value for container, why in refusals(_step(name), spec).items() if why is None]


@pytest.mark.parametrize(
    ("name", "holders"),
    [
        ("fewer or merged experts", ["gguf", "onnx", "student"]),
        ("a different number of experts in each layer", ["onnx"]),
        ("narrower experts", ["gguf", "onnx", "student"]),
        ("fewer layers", ["gguf", "onnx", "student"]),
        ("layers without experts", ["onnx"]),
        ("a dense student", ["gguf", "onnx", "student"]),
    ],
)
def test_the_containers_of_each_result(fine_folder: Path, name: str, holders: list[str]) -> None:
    assert _holders(name, read_spec(fine_folder)) == holders


def test_a_family_without_a_dense_counterpart_has_no_dense_student(olmoe_folder: Path) -> None:
    found = refusals(_step("a dense student"), read_spec(olmoe_folder))
    assert {container: why is None for container, why in found.items()} == dict.fromkeys(Container, False)
    assert "no dense architecture matches olmoe" in str(found[Container.GGUF])


def test_what_a_token_needs_cannot_go(fine_folder: Path) -> None:
    spec = altered(read_spec(fine_folder), n_experts=4, n_layers=1)
    for name, why in (
        ("fewer or merged experts", "all 4 experts of a layer are used for each token"),
        ("fewer layers", "only one layer has experts"),
        ("layers without experts", "only one layer has experts"),
    ):
        assert set(refusals(_step(name), spec).values()) == {why}


def test_groups_of_experts_stay_equally_large(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)
    layers = [
        replace(layer, feed_forward=replace(layer.routed, routing=Routing(n_groups=4, n_chosen_groups=2)))
        for layer in spec.layers
        if layer.routed is not None
    ]
    grouped = replace(spec, layers=tuple(layers))
    assert _step("fewer or merged experts").smallest(grouped).n_experts == 28
    why = refusals(_step("a different number of experts in each layer"), grouped)
    assert set(why.values()) == {"all layers keep the same number of experts"}
