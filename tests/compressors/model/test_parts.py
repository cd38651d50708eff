"""Parts that families share, as those of families that have no trained model here ask for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.reading import read_spec
from compressors.model.config.settings import Settings
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import Fused
from compressors.model.families.shared import parts
from compressors.model.files.json_file import read_json


@pytest.fixture
def spec(fine_folder: Path) -> ModelSpec:
    return read_spec(fine_folder)


@pytest.fixture
def settings(fine_folder: Path, spec: ModelSpec) -> FamilySettings:
    path = fine_folder / "config.json"
    return FamilySettings(Settings(read_json(path), path), spec.family, {})


def test_factors_are_a_part_of_the_description(settings: FamilySettings, spec: ModelSpec) -> None:
    usual = spec.layers[0]
    assert usual.feed_forward is not None
    mixer = parts.attention(settings, parts.grouped_query(spec).qk_norm, scale=0.3)
    assert mixer == replace(parts.grouped_query(spec), scale=0.3)
    layer = parts.layer(settings, mixer, usual.feed_forward, usual.tensors[::-1], residual_scale=0.2)
    assert layer == replace(usual, mixer=mixer, residual_scale=0.2)
    model = parts.model(settings, [layer], embedding_scale=12.0, logit_divisor=6.0)
    assert model == replace(spec, layers=(layer,), embedding_scale=12.0, logit_divisor=6.0)


def test_experts_that_files_hold_together_alone() -> None:
    gate_up, down = Fused("{layer}.first", is_interleaved=True), Fused("{layer}.last", is_transposed=True)
    tensors = {tensor.role: tensor for tensor in parts.fused_expert_tensors(gate_up, down)}
    fused = {role: tensor.fused for role, tensor in tensors.items()}
    assert fused == {
        Role.EXPERT_GATE: Fused("{layer}.first", 0, 2, is_only_form=True, is_interleaved=True),
        Role.EXPERT_UP: Fused("{layer}.first", 1, 2, is_only_form=True, is_interleaved=True),
        Role.EXPERT_DOWN: Fused("{layer}.last", is_only_form=True, is_transposed=True),
    }
    assert all(tensor.is_per_expert for tensor in tensors.values())
    rows = torch.arange(4)
    assert [fused[role].rows(rows).tolist() for role in (Role.EXPERT_GATE, Role.EXPERT_UP)] == [[0, 2], [1, 3]]  # type: ignore[union-attr]


def test_a_router_may_stand_under_another_name_in_its_layer() -> None:
    router = parts.router_tensor("block.gate.layer.weight", module="block.gate.weight")
    assert (router.name, router.submodule) == ("model.layers.{layer}.block.gate.layer.weight", "block.gate")
