"""A student whose experts stand on shared bases reads them as base plus adapter, and gives both apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.errors import InputError
from compressors.model.sources.adapters import adapter_tensors
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, Student

_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
_RANK, _N_BASES = 3, 2
_BASE_OF = (None, 0, 1, 0, SharedBases.ZERO, *[None] * 27)
_LAYER = 1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Checkpoint:
    """Two layers with 32 experts each, top-4."""
    return Checkpoint(toy_checkpoint(tmp_path_factory.mktemp("bases"), n_layers=2))


def _map(source: Checkpoint, shared: SharedBases) -> ExpertMap:
    first, second = ExpertMap.identity(source.spec).layers
    return ExpertMap(source.spec.n_experts, (first, replace(second, shared=shared)))


def _random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _overlay(student: Student, seed: int = 0) -> dict[str, torch.Tensor]:
    """Bases and adapters of the second layer with random values."""
    overlay = {}
    for base in range(_N_BASES):
        for role in _ROLES:
            values = _random(student.spec.dimensions(role, _LAYER), seed + base)
            overlay[student.base_name(role, _LAYER, base)] = values.to(student.expert_dtype)
    for expert, base in enumerate(_BASE_OF):
        if base is not None:
            for roles in (_ROLES[:2], _ROLES[2:]):
                rows, columns = student.spec.dimensions(roles[0], _LAYER)
                a_PRI = _random((len(roles), _RANK, columns), seed + expert)
                b_POR = _random((len(roles), rows, _RANK), seed + expert + 1)
                overlay |= adapter_tensors(student.name(roles[0], _LAYER, expert), a_PRI, b_POR)
    return overlay


@pytest.fixture
def whole(source: Checkpoint) -> Student:
    return Student(source, _map(source, SharedBases(_BASE_OF, _N_BASES, _RANK)))


def test_an_expert_is_its_base_plus_its_adapter(whole: Student, source: Checkpoint) -> None:
    overlay = _overlay(whole)
    student = whole.with_overlay(overlay)
    assert student.shared(0) is None and student.shared(_LAYER) == SharedBases(_BASE_OF, _N_BASES, _RANK)
    assert student.spec.layers[0].bases is None and student.spec.layers[_LAYER].bases == student.shared(_LAYER)
    assert "model.layers.1.mlp.experts.bases.1.down_proj.weight" in overlay
    for expert, base in enumerate(_BASE_OF):
        for role in _ROLES:
            if base is None:
                assert torch.equal(student.expert(role, _LAYER, expert), source.expert(role, _LAYER, expert))
                continue
            a_RI, b_OR = student.adapter(role, _LAYER, expert)
            below_OI = torch.zeros(1) if base == SharedBases.ZERO else student.base(role, _LAYER, base).float()
            expected_OI = (below_OI + b_OR @ a_RI).to(source.dtype)
            torch.testing.assert_close(student.expert(role, _LAYER, expert), expected_OI)


def test_a_later_overlay_replaces_the_parts_and_a_whole_expert_ends_the_form(whole: Student) -> None:
    first, second = _overlay(whole), _overlay(whole, seed=100)
    trained = whole.with_overlay(first).with_overlay(second)
    alone = whole.with_overlay(second)
    for role in _ROLES:
        for expert in (1, 2, 3, 4):
            assert torch.equal(trained.expert(role, _LAYER, expert), alone.expert(role, _LAYER, expert))
        assert torch.equal(trained.adapter(role, _LAYER, 2)[0], alone.adapter(role, _LAYER, 2)[0])
        assert torch.equal(trained.base(role, _LAYER, 0), alone.base(role, _LAYER, 0))
    name = whole.name(Role.EXPERT_DOWN, _LAYER, 2)
    assert trained.with_overlay({name: trained.expert(Role.EXPERT_DOWN, _LAYER, 2)}).shared(_LAYER) is None


def test_bases_survive_the_map_on_the_disk(tmp_path: Path, whole: Student, source: Checkpoint) -> None:
    overlay = _overlay(whole)
    (tmp_path / "map.json").write_text(json.dumps(whole.experts.to_json()))
    save_file(overlay, tmp_path / "overlay.safetensors")
    student = Student.load(source, tmp_path / "map.json", [tmp_path / "overlay.safetensors"])
    assert student.experts == whole.experts and student.shared(_LAYER) == whole.experts.layers[_LAYER].shared
    expected = whole.with_overlay(overlay).expert(Role.EXPERT_UP, _LAYER, 3)
    assert torch.equal(student.expert(Role.EXPERT_UP, _LAYER, 3), expected)


@pytest.mark.parametrize(
    "shared",
    [
        SharedBases(_BASE_OF[:-1], _N_BASES, _RANK),
        SharedBases(_BASE_OF, 3, _RANK),
        SharedBases(_BASE_OF, 1, _RANK),
        SharedBases(_BASE_OF, _N_BASES, 0),
        SharedBases((None,) * 32, 0, _RANK),
    ],
)
def test_a_map_whose_bases_do_not_fit_is_refused(tmp_path: Path, source: Checkpoint, shared: SharedBases) -> None:
    (tmp_path / "map.json").write_text(json.dumps(_map(source, shared).to_json()))
    with pytest.raises(InputError, match="stand under the experts"):
        Student.load(source, tmp_path / "map.json")
