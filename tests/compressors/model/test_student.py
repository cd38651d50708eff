"""A student reads the survivors from its source and the changed tensors from its overlay, in its own numbering."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from tests.altered import altered

_EXPERT_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Checkpoint:
    """Two layers with 32 experts each, top-4."""
    return Checkpoint(toy_checkpoint(tmp_path_factory.mktemp("student"), n_layers=2))


_KEPT = ((1, 4, 30, 31, 7), (0, 2, 3, 5, 6))


@pytest.fixture
def pruned(source: Checkpoint) -> Student:
    return Student(source, ExpertMap.keeping(32, _KEPT))


def test_student_of_tells_where_each_teacher_expert_went() -> None:
    experts = ExpertMap.keeping(6, ((5, 0, 3), (0, 1, 2)))
    assert experts.student_of(0).tolist() == [1, -1, -1, 2, -1, 0]
    assert experts.student_of(1).tolist() == [0, 1, 2, -1, -1, -1]
    assert experts.student_of(0).dtype == torch.int64


def test_every_member_of_a_group_goes_where_the_group_went() -> None:
    experts = ExpertMap(6, (LayerMap(0, ((4, 1, 2), (0, 5))),))
    assert experts.student_of(0).tolist() == [1, 0, 0, -1, 0, 1]
    assert experts.kept == ((4, 0),), "an expert comes from the first of its group"


def test_the_identity_keeps_everything_in_place(source: Checkpoint) -> None:
    identity = ExpertMap.identity(source.spec)
    identity.check_against(source.spec)
    assert identity.spec_of(source.spec) == source.spec
    assert identity.student_of(1).tolist() == list(range(32))


def test_layers_may_differ_and_go(source: Checkpoint) -> None:
    experts = ExpertMap(32, (LayerMap(0, ((3,), (7, 8), (9,)), 64), LayerMap(1, ())))
    student = Student(source, experts)
    spec = student.spec
    assert (spec.n_layers, spec.n_experts, spec.top_k, spec.expert_width) == (2, 3, 3, 64)
    assert (spec.layers[0].n_experts, spec.layers[0].expert_width) == (3, 64)
    assert (spec.layers[1].n_experts, spec.layers[1].top_k, spec.layers[1].routed) == (0, 0, None)
    assert spec.described_sizes == "3 experts of width 64, no experts"
    # neither router nor the norm before it
    attention = source.spec.layers[0].parameters_beside_experts - 32 * 256 - 256
    embedding = source.spec.vocab_size * 256 * (1 if source.spec.tied_embeddings else 2)
    assert spec.parameters == 2 * attention + 256 + 3 * 256 + 3 * (3 * 64 * 256) + embedding + 256


def test_a_layer_that_is_left_alone_comes_from_where_it_was(source: Checkpoint) -> None:
    student = Student(source, ExpertMap(32, (LayerMap(1, ((5,), (6,))),)))
    assert student.spec == altered(source.spec, n_layers=1, n_experts=2, top_k=2)
    assert torch.equal(student.tensor(Role.QUERY, 0), source.tensor(Role.QUERY, 1))
    assert torch.equal(student.rows(Role.QUERY, 0, slice(3, 5)), source.tensor(Role.QUERY, 1)[3:5])
    assert torch.equal(student.tensor(Role.ROUTER, 0), source.tensor(Role.ROUTER, 1)[5:7])
    assert torch.equal(student.expert(Role.EXPERT_DOWN, 0, 1), source.expert(Role.EXPERT_DOWN, 1, 6))
    assert student.dtype(Role.QUERY, 0) == source.dtype


def test_the_map_survives_json(tmp_path: Path, source: Checkpoint) -> None:
    experts = ExpertMap.keeping(32, _KEPT)
    text = json.dumps(experts.to_json())
    assert ExpertMap.from_json(json.loads(text)) == experts
    (tmp_path / "map.json").write_text(text)
    assert Student.load(source, tmp_path / "map.json").experts == experts


def test_the_teacher_is_the_source(source: Checkpoint) -> None:
    teacher = Student.teacher(source)
    assert teacher.spec == source.spec
    for role in (tensor.role for tensor in source.spec.layers[1].shared_tensors):
        assert torch.equal(teacher.tensor(role, 1), source.tensor(role, 1))
    for role in (Role.TOKEN_EMBEDDING, Role.FINAL_NORM, Role.HEAD):
        assert torch.equal(teacher.tensor(role), source.tensor(role))
    for role in _EXPERT_ROLES:
        assert all(torch.equal(teacher.expert(role, 0, e), source.expert(role, 0, e)) for e in range(32))


@pytest.mark.parametrize("layer", [0, 1])
def test_router_rows_and_experts_are_the_survivors_in_their_order(
    pruned: Student, source: Checkpoint, layer: int
) -> None:
    router = source.tensor(Role.ROUTER, layer)
    assert torch.equal(pruned.tensor(Role.ROUTER, layer), torch.stack([router[e] for e in _KEPT[layer]]))
    for number, original in enumerate(_KEPT[layer]):
        for role in _EXPERT_ROLES:
            assert torch.equal(pruned.expert(role, layer, number), source.expert(role, layer, original))
    assert torch.equal(pruned.tensor(Role.QUERY, layer), source.tensor(Role.QUERY, layer))


def test_an_expert_that_does_not_exist_is_an_error(pruned: Student) -> None:
    with pytest.raises(IndexError):
        pruned.expert(Role.EXPERT_UP, 0, 5)


@pytest.mark.parametrize(("n_experts", "top_k"), [(32, 4), (5, 4), (4, 4), (3, 3), (1, 1)])
def test_top_k_never_exceeds_the_experts_left(source: Checkpoint, n_experts: int, top_k: int) -> None:
    kept = tuple(range(n_experts))
    spec = Student(source, ExpertMap.keeping(32, (kept, kept))).spec
    assert spec == altered(source.spec, n_experts=n_experts, top_k=top_k)


def test_the_overlay_comes_first_and_is_in_the_student_s_numbering(pruned: Student, source: Checkpoint) -> None:
    router, expert = torch.randn(5, 256), torch.randn(128, 256)
    changed = pruned.with_overlay(
        {
            "model.layers.1.mlp.gate.weight": router,
            "model.layers.0.mlp.experts.2.up_proj.weight": expert,
        }
    )
    assert changed.tensor(Role.ROUTER, 1) is router, "not sliced again, and in its own dtype"
    assert torch.equal(changed.tensor(Role.ROUTER, 0), pruned.tensor(Role.ROUTER, 0))
    assert changed.expert(Role.EXPERT_UP, 0, 2) is expert
    assert torch.equal(changed.expert(Role.EXPERT_UP, 0, 1), source.expert(Role.EXPERT_UP, 0, 4))
    assert torch.equal(changed.expert(Role.EXPERT_UP, 1, 2), source.expert(Role.EXPERT_UP, 1, 3))
    assert pruned.overlay == {}, "the student it was made from is as it was"


def test_a_second_overlay_keeps_the_first_where_it_is_silent(pruned: Student) -> None:
    first = {"model.norm.weight": torch.ones(256), "model.embed_tokens.weight": torch.zeros(4096, 256)}
    both = pruned.with_overlay(first).with_overlay({"model.norm.weight": torch.full((256,), 2.0)})
    assert both.tensor(Role.FINAL_NORM)[0] == 2.0
    assert not both.tensor(Role.TOKEN_EMBEDDING).any()


def test_a_tied_head_follows_the_embedding_s_overlay(pruned: Student) -> None:
    """The head is the embedding: changing one on its own would give torch and the files different models."""
    embedding = torch.zeros(4096, 256)
    changed = pruned.with_overlay({"model.embed_tokens.weight": embedding})
    assert torch.equal(changed.tensor(Role.HEAD), embedding)


def test_load_reads_map_and_overlay(pruned: Student, source: Checkpoint, tmp_path: Path) -> None:
    router = torch.randn(5, 256)
    (tmp_path / "map.json").write_text(json.dumps(pruned.experts.to_json()))
    save_file({"model.layers.0.mlp.gate.weight": router}, tmp_path / "overlay.safetensors")
    student = Student.load(source, tmp_path / "map.json", [tmp_path / "overlay.safetensors"])
    assert torch.equal(student.tensor(Role.ROUTER, 0), router)
    assert student.spec == pruned.spec


def _map(*layers: dict[str, object], n_experts: object = 32) -> str:
    entries = [{"source": 0, "groups": [[0]], "width": None, **layer} for layer in layers]
    return json.dumps({"teacher_experts": n_experts, "layers": entries})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"teacher_experts": 32}',
        '{"teacher_experts": 32, "layers": [1, 2]}',
        _map({}, n_experts="many"),
        _map(),
        _map({}, n_experts=16),  # another model's
        _map({"groups": [[32]]}),  # there is no expert 32
        _map({"groups": [[-1]]}),
        _map({"groups": [["1"]]}),
        _map({"groups": [[0], [0]]}),  # twice the same
        _map({"groups": [[0], []]}),  # a group of none
        _map({"source": 2}),  # there is no layer 2
        _map({"source": 1}, {"source": 0}),  # not in order
        _map({"width": 129}),  # wider than they were
        _map({"width": 0}),
    ],
)
def test_a_damaged_map_is_named(source: Checkpoint, tmp_path: Path, text: str) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(InputError, match=r"the student in .* cannot be read"):
        Student.load(source, tmp_path / "map.json")


def test_a_damaged_or_missing_overlay_is_named(pruned: Student, source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(pruned.experts.to_json()))
    with pytest.raises(InputError, match=r"the student in .* cannot be read"):
        Student.load(source, tmp_path / "map.json", [tmp_path / "overlay.safetensors"])
    (tmp_path / "overlay.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0damaged!")
    with pytest.raises(InputError, match=r"the student in .* cannot be read"):
        Student.load(source, tmp_path / "map.json", [tmp_path / "overlay.safetensors"])
