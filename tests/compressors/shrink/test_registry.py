"""The registry of methods: each makes what its line says, and the recipes and the command line name no others."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from compressors.model.config.reading import read_spec
from compressors.model.description.spec import NO_MOE, ModelSpec
from compressors.shrink.criteria import CRITERION_NAMES
from compressors.shrink.decompose import D2Moe
from compressors.shrink.merge import REAM
from compressors.shrink.moe_block import Needs
from compressors.shrink.prune import Prune
from compressors.shrink.registry import EDITS, EXPERT_METHODS, KEEPS_EXPERTS, METHODS, Changes, made
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refusal
from exporter.planning.compression import expected_spec
from exporter.planning.flags import Flags
from exporter.planning.recipe import CompressChoice
from exporter.searching.structures import replacing


def test_recipes_and_command_line_name_what_is_registered() -> None:
    named = {name: get_args(CompressChoice.model_fields[name].annotation) for name in ("method", "edit")}
    assert named == {"method": ("none", *EXPERT_METHODS), "edit": ("none", *EDITS)}
    for name in ("auto", *EXPERT_METHODS, *KEEPS_EXPERTS):
        Flags(budget="1GB", method=name, formats="onnx").job()
    assert {*EXPERT_METHODS, *EDITS, *KEEPS_EXPERTS} == set(METHODS)
    assert set(CRITERION_NAMES) < set(EXPERT_METHODS)


def test_a_line_makes_the_method_that_it_describes() -> None:
    assert made("reap", 5) == Prune("reap", 5)
    assert made("ream", 5) == REAM(5)
    assert made("d2-moe", 5) == D2Moe(5)
    assert METHODS["reap"].needs is Needs.STATISTICS
    assert METHODS["removal-error"].needs is METHODS["ream"].needs is Needs.INPUTS
    assert METHODS["removal-error"].score is METHODS["ream"].score is None is not METHODS["man"].score
    assert METHODS["ream"].is_sequential and not METHODS["reap"].is_sequential
    changing = {name for name, method in METHODS.items() if method.changes_weights}
    assert changing == {"m-smoe", "hc-smoe", "ream", "svd", "d2-moe", "mobe", "lightmoe", "slim"}
    with pytest.raises(AssertionError, match="whole layers"):
        made("block-drop", 1)


def test_what_gguf_cannot_hold_is_what_the_writer_refuses(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)

    def holds(student: ModelSpec) -> bool:
        return refusal(student, Container.GGUF) is None

    results = {
        Changes.NUMBER: spec.with_experts(8),
        Changes.MERGED: spec.with_experts(8),
        Changes.WIDTH: spec.with_sizes([layer.moe for layer in spec.layers]),
        Changes.VALUES: spec,
        Changes.SHARED: expected_spec(replacing(0.3, spec), spec),
        Changes.EXPERTS_OF_LAYERS: spec.with_sizes([*(layer.moe for layer in spec.layers[1:]), NO_MOE]),
        Changes.LAYERS: spec.with_sizes([layer.moe for layer in spec.layers[1:]]),
    }
    assert {name: method.in_gguf for name, method in METHODS.items()} == {
        name: holds(results[method.changes]) for name, method in METHODS.items()
    }
