"""Training by every scope and objective: deterministic, resumable, written back exactly, and it helps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from compressors.calibration.teacher import TeacherTargets, write_log_probs, write_targets
from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.files.weight_file import StoredTensors
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from compressors.recover.divergence import judge
from compressors.recover.objectives import Distillation, NextToken, RouterLogitMatching
from compressors.recover.schedule import Schedule
from compressors.recover.scopes import Scope
from compressors.recover.trained_student import TrainedStudent
from compressors.recover.training import Training, TrainingDivergedError, train

_SCOPES = [Scope.routers(), Scope.most_used(3), Scope.all_experts(), Scope.adapters(4)]
_USAGE = [torch.arange(16.0), torch.arange(16.0).flip(0)]
_EXPERT_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


@pytest.fixture(scope="module")
def blocks_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(heldout_tokens[: 28 * 32].reshape(28, 32))


@pytest.fixture(scope="module")
def targets(float32_toy: Source, blocks_BT: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> TeacherTargets:
    model = StreamedModel(Student.teacher(float32_toy))
    (hidden,) = model.stream([TokenGroup(blocks_BT)])
    targets = TeacherTargets.create(tmp_path_factory.mktemp("targets"), blocks_BT.numel(), model.spec.vocab_size)
    write_targets(model, hidden, targets, range(len(blocks_BT)))
    return targets


def _training(student: Student, blocks_BT: torch.Tensor, targets: TeacherTargets, scope: Scope) -> Training:
    settings = Schedule(n_blocks=6, learning_rate=1e-3, blocks_per_step=2, seed=5)
    return Training(student, blocks_BT, Distillation(targets, student), settings, scope=scope, usage=_USAGE)


def _logits(model: StreamedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    (hidden,) = model.stream([TokenGroup(tokens_BT)])
    return torch.cat([logits for _, logits in model.logits_in_chunks(hidden, slice(0, tokens_BT.shape[1]))]).detach()


@pytest.mark.parametrize("scope", _SCOPES, ids=lambda scope: scope.name)
def test_runs_are_the_same_bits_interrupted_or_not(
    pruned_toy: Student, blocks_BT: torch.Tensor, targets: TeacherTargets, tmp_path: Path, scope: Scope
) -> None:
    def save(training: Training) -> None:
        save_file(training.state(), tmp_path / f"{training.n_done}.safetensors")

    expected = train(_training(pruned_toy, blocks_BT, targets, scope), after_step=save)
    again = train(_training(pruned_toy, blocks_BT, targets, scope))
    resumed = _training(pruned_toy, blocks_BT, targets, scope)
    resumed.restore(StoredTensors(tmp_path / "1.safetensors"))
    assert resumed.n_done == 1
    continued = train(resumed)
    for name, tensor in expected.overlay.items():
        assert torch.equal(again.overlay[name], tensor)
        assert torch.equal(continued.overlay[name], tensor)


@pytest.mark.parametrize("scope", _SCOPES, ids=lambda scope: scope.name)
def test_what_was_trained_is_written_back(
    pruned_toy: Student, blocks_BT: torch.Tensor, targets: TeacherTargets, tmp_path: Path, scope: Scope
) -> None:
    training = _training(pruned_toy, blocks_BT, targets, scope)
    train(training)
    save_file(training.overlay(), tmp_path / "overlay.safetensors")
    (tmp_path / "map.json").write_text(json.dumps(pruned_toy.experts.to_json()), encoding="utf-8")
    taught = Student.load(pruned_toy.source, tmp_path / "map.json", [tmp_path / "overlay.safetensors"])

    experts = {0: (13, 14, 15), 1: (0, 1, 2)} if scope == Scope.most_used(3) else dict.fromkeys((0, 1), range(16))
    n_experts = 0 if scope == Scope.routers() else sum(map(len, experts.values()))
    assert len(taught.overlay) == 2 + 3 * n_experts
    state = training.state()
    for layer in (0, 1):
        assert torch.equal(taught.tensor(Role.ROUTER, layer), state[f"{layer}.router"])
        assert not torch.equal(taught.tensor(Role.ROUTER, layer), pruned_toy.tensor(Role.ROUTER, layer))
        for row, expert in enumerate(experts[layer] if n_experts else ()):
            gate, up, down = (taught.expert(role, layer, expert) for role in _EXPERT_ROLES)
            if scope.adapter_rank is None:
                assert torch.equal(torch.cat([gate, up]), state[f"{layer}.gate_up.weight"][row])
                assert torch.equal(down, state[f"{layer}.down.weight"][row])
            else:
                a, b = state[f"{layer}.gate_up.a"][row], state[f"{layer}.gate_up.b"][row]
                before = pruned_toy.expert(Role.EXPERT_UP, layer, expert)
                torch.testing.assert_close(up, before + b[1] @ a[1], rtol=1e-5, atol=1e-6)
                before = pruned_toy.expert(Role.EXPERT_DOWN, layer, expert)
                a, b = state[f"{layer}.down.a"][row], state[f"{layer}.down.b"][row]
                torch.testing.assert_close(down, before + b[0] @ a[0], rtol=1e-5, atol=1e-6)


def test_merged_adapters_compute_what_adapters_compute(pruned_toy: Student, blocks_BT: torch.Tensor) -> None:
    trained = TrainedStudent(pruned_toy, Scope.adapters(4), seed=3)
    begins = pruned_toy.with_overlay(trained.overlay())
    for layer in (0, 1):
        assert torch.equal(begins.expert(Role.EXPERT_UP, layer, 5), pruned_toy.expert(Role.EXPERT_UP, layer, 5))
    with_adapters = trained.streamed(None)
    assert torch.equal(_logits(with_adapters, blocks_BT[:2]), _logits(StreamedModel(pruned_toy), blocks_BT[:2]))
    generator = torch.Generator().manual_seed(1)
    for (name, _), tensor in trained.parameters.items():
        if name.endswith(".b"):
            tensor.data.normal_(0, 0.02, generator=generator)
    changed = _logits(with_adapters, blocks_BT[:2])
    merged = _logits(StreamedModel(pruned_toy.with_overlay(trained.overlay())), blocks_BT[:2])
    assert (merged - changed).norm() < 1e-5 * changed.norm()
    assert (_logits(StreamedModel(pruned_toy), blocks_BT[:2]) - changed).norm() > 1e-2 * changed.norm()


def test_adapters_stay_adapters_until_a_matrix_is_read(pruned_toy: Student, tmp_path: Path) -> None:
    """Those of a second training lie on top of the first's; every matrix is the same bits whoever reads it."""
    generator = torch.Generator().manual_seed(1)
    taught = pruned_toy
    expected = {role: pruned_toy.expert(role, 1, 5) for role in _EXPERT_ROLES}
    for number in range(2):
        trained = TrainedStudent(taught, Scope.adapters(2), seed=number)
        for (name, _), tensor in trained.parameters.items():
            if name.endswith(".b"):
                tensor.data.normal_(0, 0.02, generator=generator)
        tensors = {f"{name}.{layer}": tensor.detach() for (name, layer), tensor in trained.parameters.items()}
        products = [
            *(tensors["gate_up.b.1"][5] @ tensors["gate_up.a.1"][5]),
            *(tensors["down.b.1"][5] @ tensors["down.a.1"][5]),
        ]
        for role, product in zip(_EXPERT_ROLES, products, strict=True):
            expected[role] = (expected[role].float() + product).to(expected[role].dtype)
        save_file(trained.overlay(), tmp_path / f"{number}.safetensors")
        taught = taught.with_overlay(StoredTensors(tmp_path / f"{number}.safetensors"))
    experts = 2 * 16 * 3 * pruned_toy.spec.hidden_size * pruned_toy.spec.expert_width
    assert (tmp_path / "0.safetensors").stat().st_size < experts * 4 / 20
    (tmp_path / "map.json").write_text(json.dumps(pruned_toy.experts.to_json()), encoding="utf-8")
    overlays = [tmp_path / "1.safetensors", tmp_path / "0.safetensors"]  # the last first
    loaded = Student.load(pruned_toy.source, tmp_path / "map.json", overlays)
    for role, matrix in expected.items():
        for student in (taught, loaded):
            assert torch.equal(student.expert(role, 1, 5), matrix)
            out = torch.empty_like(matrix)
            student.read_expert(role, 1, 5, out)
            assert torch.equal(out, matrix)
            assert student.dtype(role, 1, 5) == matrix.dtype
        assert not loaded.stored_types(role, 1, 5)
    assert not loaded.is_original


def test_experts_go_back_to_storage_dtype_and_routers_stay_float32(fine_folder: Path) -> None:
    teacher = Student.teacher(open_source(fine_folder))
    assert teacher.source.dtype == torch.bfloat16
    trained = TrainedStudent(teacher, Scope.most_used(1), usage=[torch.arange(32)] * 6)
    matrix = trained.parameters["down.weight", 2]
    matrix.data.mul_(1.01)
    overlay = trained.overlay()
    assert torch.equal(overlay[teacher.name(Role.EXPERT_DOWN, 2, 31)], matrix[0].bfloat16())
    assert overlay[teacher.name(Role.ROUTER, 2)].dtype == torch.float32
    matrix.data.zero_()
    assert overlay[teacher.name(Role.EXPERT_DOWN, 2, 31)].any()  # a copy


@pytest.mark.parametrize("scope", _SCOPES, ids=lambda scope: scope.name)
def test_every_scope_brings_the_student_nearer(
    float32_toy: Source,
    pruned_toy: Student,
    blocks_BT: torch.Tensor,
    targets: TeacherTargets,
    tmp_path: Path,
    scope: Scope,
) -> None:
    settings = Schedule(n_blocks=24, learning_rate=2e-3, blocks_per_step=4)
    objective = Distillation(targets, pruned_toy)
    taught = train(Training(pruned_toy, blocks_BT, objective, settings, scope=scope, usage=_USAGE))
    unseen, scored = blocks_BT[24:], slice(8, 31)
    teacher = StreamedModel(Student.teacher(float32_toy))
    (hidden,) = teacher.stream([TokenGroup(unseen)])
    writer = LogProbWriter(tmp_path, len(unseen) * 23, teacher.spec.vocab_size)
    write_log_probs(teacher, unseen, hidden, scored, writer, range(len(unseen)))
    reader = LogProbReader(tmp_path)
    assert (
        judge(taught, unseen, reader, scored).divergence < 0.98 * judge(pruned_toy, unseen, reader, scored).divergence
    )


def test_next_token_loss_is_its_definition(pruned_toy: Student, blocks_BT: torch.Tensor) -> None:
    settings = Schedule(n_blocks=4, learning_rate=1e-3, blocks_per_step=4, seed=2)
    training = Training(pruned_toy, blocks_BT, NextToken(), settings)
    logits_BTV = _logits(StreamedModel(pruned_toy), blocks_BT[:4]).unflatten(0, (4, 32))
    expected = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), blocks_BT[:4, 1:].flatten())
    assert training.step() == pytest.approx(expected.item(), rel=1e-5)


def test_router_logits_come_nearer(float32_toy: Source, pruned_toy: Student, blocks_BT: torch.Tensor) -> None:
    objective = RouterLogitMatching(StreamedModel(Student.teacher(float32_toy)), pruned_toy)
    training = Training(pruned_toy, blocks_BT[:4], objective, Schedule(4, 1e-3, blocks_per_step=4))
    before = training.step()
    again = Training(training.taught(), blocks_BT[:4], objective, Schedule(4, 1e-3, blocks_per_step=4))
    assert again.step() < 0.98 * before


def test_memory_limit_changes_no_bit(
    pruned_toy: Student, blocks_BT: torch.Tensor, targets: TeacherTargets, tmp_path: Path
) -> None:
    settings = Schedule(n_blocks=2, learning_rate=1e-3, blocks_per_step=2)
    students = [
        train(Training(pruned_toy, blocks_BT, Distillation(targets, pruned_toy), settings, limit=limit))
        for limit in (None, MemoryLimit(1, tmp_path), MemoryLimit(10**12, tmp_path))
    ]
    for name, tensor in students[0].overlay.items():
        assert all(torch.equal(student.overlay[name], tensor) for student in students)


def test_training_that_diverges_names_the_step_and_what_to_do(pruned_toy: Student, blocks_BT: torch.Tensor) -> None:
    settings = Schedule(n_blocks=6, learning_rate=1e30, blocks_per_step=2)
    with pytest.raises(TrainingDivergedError, match=r"step 2 of 3 .* lower the learning rate"):
        train(Training(pruned_toy, blocks_BT, NextToken(), settings, scope=Scope.all_experts()))


def test_a_loss_that_is_not_a_number_changes_nothing(
    pruned_toy: Student, blocks_BT: torch.Tensor, targets: TeacherTargets, tmp_path: Path
) -> None:
    broken = TeacherTargets.create(tmp_path, blocks_BT.numel(), pruned_toy.spec.vocab_size)
    broken.write(0, torch.full((blocks_BT.numel(), pruned_toy.spec.vocab_size), torch.nan))
    settings = Schedule(n_blocks=2, learning_rate=1e-3, blocks_per_step=2)
    training = Training(pruned_toy, blocks_BT, Distillation(broken, pruned_toy), settings)
    with pytest.raises(TrainingDivergedError, match=r"step 1 of 1 .* loss is nan"):
        training.step()
    assert training.n_done == 0
    assert torch.equal(training.state()["0.router"], pruned_toy.tensor(Role.ROUTER, 0))


@pytest.mark.parametrize(
    ("n_blocks", "per_step", "message"),
    [(29, 2, "wants 29 blocks"), (3, 4, "3 blocks of 32 tokens, but one step takes 4")],
)
def test_too_little_text_is_refused(
    pruned_toy: Student, blocks_BT: torch.Tensor, n_blocks: int, per_step: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Training(pruned_toy, blocks_BT, NextToken(), Schedule(n_blocks, 1e-3, per_step))


def test_a_vocabulary_that_differs_is_refused(pruned_toy: Student, blocks_BT: torch.Tensor, tmp_path: Path) -> None:
    n_tokens = pruned_toy.spec.vocab_size
    settings = Schedule(2, 1e-3, 2)
    wider = TeacherTargets.create(tmp_path / "targets", blocks_BT.numel(), n_tokens + 8)
    logits = -torch.arange(n_tokens + 8.0).repeat(blocks_BT.numel(), 1)
    logits[:, n_tokens + 3] = 9.0
    wider.write(0, logits)
    with pytest.raises(InputError, match=f"name token {n_tokens + 3}.*one tokenizer"):
        Training(pruned_toy, blocks_BT, Distillation(wider, pruned_toy), settings).step()
    LogProbWriter(tmp_path / "selection", 30, n_tokens + 8).write(0, logits[:30])
    with pytest.raises(InputError, match=re.escape(f"are of {n_tokens + 8} tokens")):
        judge(pruned_toy, blocks_BT[:2], LogProbReader(tmp_path / "selection"), slice(0, 15))
    with pytest.raises(InputError, match=f"has token {n_tokens}"):
        Training(pruned_toy, torch.full((2, 4), n_tokens), NextToken(), settings)
