"""Training replaced experts: originals fade out, bases and adapters fade in, by the gradients of what both put out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from compressors.calibration.statistics import LayerStatistics
from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.files.weight_file import StoredTensors
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, Student
from compressors.recover.objectives import NextToken
from compressors.recover.schedule import Schedule
from compressors.recover.scopes import Scope
from compressors.recover.trained_student import TrainedStudent
from compressors.recover.training import Training, train
from compressors.recover.training_memory import training_bytes
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from compressors.shrink.moe_block import Evidence, MoeBlock
from compressors.shrink.replace.light_moe import LightMoE

_EXPERT_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


@pytest.fixture(scope="module")
def blocks_BT() -> torch.Tensor:
    return torch.randint(0, 4096, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def replaced(float32_toy: Source, trained_block: Callable[..., tuple[MoeBlock, Evidence]]) -> Student:
    """Two layers, with 20 and 6 of 32 experts replaced."""
    statistics: list[LayerStatistics] = [trained_block(float32_toy.path, layer)[1].statistics for layer in (0, 1)]
    size = float32_toy.spec.layers[0].moe
    targets = [LayerTarget(layer, size, (LightMoE(n, 2, 3),), True) for layer, n in enumerate((20, 6))]
    tokens_BT = torch.arange(512).reshape(1, 512)
    run = list(LayerwiseCompression(float32_toy, targets, statistics, tokens_BT, n_sample_blocks=1).run())
    student = Student(float32_toy, ExpertMap(32, tuple(layer.map for layer in run)))
    return student.with_overlay({name: tensor for layer in run for name, tensor in layer.overlay.items()})


def _training(student: Student, blocks_BT: torch.Tensor, fade_ratio: float = 0.5) -> Training:
    schedule = Schedule(8, 1e-3, 2, fade_ratio=fade_ratio)
    return Training(student, blocks_BT, NextToken(), schedule, scope=Scope.replaced_experts())


def _states(model: StreamedModel, blocks_BT: torch.Tensor) -> torch.Tensor:
    (states,) = model.stream([TokenGroup(blocks_BT[:2])])
    return states.read(slice(0, 2))


def test_it_begins_as_the_original_and_ends_as_the_student(replaced: Student, blocks_BT: torch.Tensor) -> None:
    trained = TrainedStudent(replaced, Scope.replaced_experts())
    model = trained.streamed(None)
    original = _states(StreamedModel(Student.teacher(replaced.source)), blocks_BT)
    student = _states(StreamedModel(replaced), blocks_BT)
    trained.fade.share = 0.0
    assert torch.equal(_states(model, blocks_BT), original)
    trained.fade.share = 0.5
    between = _states(model, blocks_BT)
    assert not torch.equal(between, original) and not torch.equal(between, student)
    trained.fade.share = 1.0
    assert torch.equal(_states(model, blocks_BT), student)


def test_the_share_rises_in_a_line_from_nothing_to_all() -> None:
    schedule = Schedule(20, 1e-3, 2, fade_ratio=0.4)
    shares = [schedule.replaced_share_at(step) for step in range(schedule.n_steps)]
    assert shares == [0, 0.25, 0.5, 0.75, *[1.0] * 6]
    assert {Schedule(20, 1e-3, 2).replaced_share_at(step) for step in range(10)} == {1.0}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_a_mean_of_both(replaced: Student, share: float) -> None:
    """Written out token by token, autograd finds the same for inputs, gates, bases and adapters."""
    trained = TrainedStudent(replaced, Scope.replaced_experts())
    trained.fade.share = share
    model, generator = trained.streamed(None), torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(12, 256, generator=generator).requires_grad_()
    chosen_TK = torch.stack([torch.randperm(32, generator=generator)[:4] for _ in range(12)])
    gates_TK = torch.rand(12, 4, generator=generator).requires_grad_()
    direction_TD = torch.randn(12, 256, generator=generator)
    parts = [tensor for (name, layer), tensor in trained.parameters.items() if layer == 0 and name != Role.ROUTER]
    inputs = [hidden_TD, gates_TK, *parts]
    (weights,) = (weights for _, weights in model.weights([0]))
    with model.layer(0, weights) as layer:
        routed = replaced.spec.layers[0].routed
        assert routed is not None
        output_TD = layer.get_submodule(routed.experts_module)(hidden_TD, chosen_TK, gates_TK)
        found = torch.autograd.grad((output_TD * direction_TD).sum(), inputs)
    expected_TD = _written_out(replaced, parts, share, hidden_TD, chosen_TK, gates_TK)
    torch.testing.assert_close(output_TD, expected_TD, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad((expected_TD * direction_TD).sum(), inputs, allow_unused=True)
    for ours, theirs, tensor in zip(found, expected, inputs, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(tensor) if theirs is None else theirs, rtol=1e-3, atol=1e-4)


def _written_out(
    student: Student,
    parts: list[torch.Tensor],
    share: float,
    hidden_TD: torch.Tensor,
    chosen_TK: torch.Tensor,
    gates_TK: torch.Tensor,
) -> torch.Tensor:
    """The first layer's routed output, from bases and adapters of gate and up, then of down."""
    shared, source = student.shared(0), student.source
    assert shared is not None

    def output(gate_FD: torch.Tensor, up_FD: torch.Tensor, down_DF: torch.Tensor, x_D: torch.Tensor) -> torch.Tensor:
        return down_DF @ (functional.silu(gate_FD @ x_D) * (up_FD @ x_D))

    base_in, a_in, b_in, base_out, a_out, b_out = parts
    rows = []
    for x_D, chosen, gates in zip(hidden_TD, chosen_TK.tolist(), gates_TK, strict=True):
        total_D = torch.zeros(256)
        for expert, gate in zip(chosen, gates, strict=True):
            original_D = output(*(source.expert(role, 0, expert) for role in _EXPERT_ROLES), x_D)
            base = shared.base_of[expert]
            if base is None:
                total_D = total_D + gate * original_D
                continue
            row = shared.replaced.index(expert)
            gate_FD, up_FD = base_in[base].view(2, 128, 256) + b_in[row] @ a_in[row]
            replaced_D = output(gate_FD, up_FD, base_out[base] + (b_out[row] @ a_out[row])[0], x_D)
            total_D = total_D + gate * (share * replaced_D + (1 - share) * original_D)
        rows.append(total_D)
    return torch.stack(rows)


def test_runs_are_the_same_bits_interrupted_or_not(replaced: Student, blocks_BT: torch.Tensor, tmp_path: Path) -> None:
    """The snapshots are one from within the fade, one from behind it."""

    def save(training: Training) -> None:
        save_file(training.state(), tmp_path / f"{training.n_done}.safetensors")

    expected = train(_training(replaced, blocks_BT), after_step=save)
    for n_done in (1, 3):
        resumed = _training(replaced, blocks_BT)
        resumed.restore(StoredTensors(tmp_path / f"{n_done}.safetensors"))
        continued = train(resumed)
        for name, tensor in expected.overlay.items():
            assert torch.equal(continued.overlay[name], tensor)
    assert expected.shared(0) == replaced.shared(0) and expected.shared(1) == replaced.shared(1)


def test_it_teaches_bases_adapters_and_routers_and_nothing_else(replaced: Student, blocks_BT: torch.Tensor) -> None:
    training = _training(replaced, blocks_BT, fade_ratio=0.0)
    taught = train(training)
    shared = replaced.shared(1)
    assert shared is not None
    for role in _EXPERT_ROLES:
        assert not torch.equal(taught.base(role, 1, 1), replaced.base(role, 1, 1))
        for expert in range(32):
            is_same = torch.equal(taught.expert(role, 1, expert), replaced.expert(role, 1, expert))
            assert is_same == (expert not in shared.replaced)
    assert not torch.equal(taught.tensor(Role.ROUTER, 1), replaced.tensor(Role.ROUTER, 1))
    assert training.settings.n_steps == training.n_done == 4


def test_bytes_are_those_of_the_tensors(replaced: Student) -> None:
    scope = Scope.replaced_experts()
    tensors = TrainedStudent(replaced, scope).parameters.values()
    assert training_bytes(scope, replaced.spec).weights == sum(tensor.nbytes for tensor in tensors)


def test_experts_on_bases_are_not_trained_in_other_ways(replaced: Student, float32_toy: Source) -> None:
    for scope in (Scope.all_experts(), Scope.adapters(2), Scope.most_used(1)):
        with pytest.raises(InputError, match="stand on shared bases"):
            scope.check_against(replaced.spec)
    with pytest.raises(InputError, match="no expert of this model was"):
        Scope.replaced_experts().check_against(float32_toy.spec)
