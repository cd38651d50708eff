"""The comparison of all kinds of training: arms do what they say, and the tables say what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

from benchmarks.recovery.arms import ARMS, FULL_VOCABULARY, NONE, ROUTER_KD, SWEEP, FullDistillation, Knowledge, Pace
from benchmarks.recovery.layer_local import train_routers_locally
from benchmarks.recovery.measure import Measured
from benchmarks.recovery.runs import LADDER_BLOCKS, SEEDS, SHORT_BLOCKS, SWEEP_BLOCKS, Run, all_runs
from benchmarks.recovery.students import ALL_EXPERTS_ON, DENSE, PRUNED, UNCHANGED, load_student, store_student
from benchmarks.recovery.table import ladder, read, write_csv, write_markdown
from benchmarks.recovery.unfinished import Unfinished
from compressors.calibration.teacher import TeacherTargets
from compressors.model.description.roles import Role
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, Student
from compressors.recover.objectives import NextToken, StepLoss
from compressors.recover.schedule import Schedule
from compressors.recover.training import Training


@pytest.fixture(scope="module")
def source(toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The first two layers of the bundled model."""
    return open_source(toy_checkpoint(tmp_path_factory.mktemp("recovery")))


@pytest.fixture(scope="module")
def pruned(source: Source) -> Student:
    return Student(source, ExpertMap.keeping(32, (tuple(range(0, 32, 2)),) * 2))


@pytest.fixture(scope="module")
def blocks_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(heldout_tokens[: 12 * 32].reshape(12, 32))


def _outputs(student: Student, layer: int, inputs: HiddenStates) -> torch.Tensor:
    """The output of a layer for these states."""
    model = StreamedModel(student)
    outputs = HiddenStates(inputs.shape, torch.float32)
    for index, weights in model.weights([layer]):
        model.run(index, weights, inputs, outputs)
    return outputs.read(slice(0, len(outputs)))


def test_layer_local_routers_come_nearer_to_every_layers_output(
    source: Source, pruned: Student, blocks_BT: torch.Tensor
) -> None:
    teacher = Student.teacher(source)
    taught = train_routers_locally(teacher, pruned, blocks_BT, Schedule(12, 1e-3, blocks_per_step=2))
    (inputs,) = StreamedModel(teacher).first_states([TokenGroup(blocks_BT)])
    for layer in (0, 1):
        wanted = _outputs(teacher, layer, inputs)
        before, after = (
            (_outputs(student, layer, inputs) - wanted).square().mean().item() for student in (pruned, taught)
        )
        assert after < 0.99 * before
        inputs.write(slice(0, len(inputs)), wanted)
    assert set(taught.overlay) == {pruned.name(Role.ROUTER, layer) for layer in (0, 1)}


def _logits(student: Student, tokens_BT: torch.Tensor) -> torch.Tensor:
    model = StreamedModel(student)
    (hidden,) = model.stream([TokenGroup(tokens_BT)])
    every = slice(0, tokens_BT.shape[1])
    logits_NV = torch.cat([logits for _, logits in model.logits_in_chunks(hidden, every)])
    return logits_NV.unflatten(0, tokens_BT.shape)


def test_full_distillation_is_its_definition(
    source: Source, pruned: Student, blocks_BT: torch.Tensor, tmp_path: Path
) -> None:
    targets = TeacherTargets.create(tmp_path, 1, 4096)  # which it does not read
    schedule = Schedule(4, 1e-3, blocks_per_step=4)
    knowledge = Knowledge(source, [], blocks_BT, targets, MemoryLimit(1, tmp_path), Unfinished(tmp_path / "unfinished"))
    objective = FullDistillation(knowledge, pruned, schedule)
    training = Training(pruned, blocks_BT, objective, schedule)
    wanted, found = (
        torch.log_softmax(_logits(student, blocks_BT[:4])[:, :-1].flatten(0, 1), dim=-1)
        for student in (Student.teacher(source), pruned)
    )
    expected = functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
    assert training.step() == pytest.approx(expected.item(), rel=1e-5)


class _Killed(Exception):
    pass


class _KilledBefore(NextToken):
    def __init__(self, step: int) -> None:
        self._left = step

    def of_step(self, *arguments: Any) -> StepLoss:
        if self._left == 0:
            raise _Killed
        self._left -= 1
        return super().of_step(*arguments)


def test_a_killed_run_goes_on_where_it_stopped(pruned: Student, blocks_BT: torch.Tensor, tmp_path: Path) -> None:
    def training(objective: NextToken) -> Training:
        return Training(pruned, blocks_BT, objective, Schedule(12, 1e-3, blocks_per_step=2))

    expected = Unfinished(tmp_path / "never killed", pause=0.0).train(training(NextToken()))
    first = Unfinished(tmp_path / "killed", pause=0.0)
    with pytest.raises(_Killed):
        first.train(training(_KilledBefore(4)))
    second = Unfinished(tmp_path / "killed", pause=0.0)
    own = second.seconds
    with pytest.raises(_Killed):  # two steps are left
        second.train(training(_KilledBefore(1)))
    assert second.seconds > own + 0.5 * first.seconds
    third = Unfinished(tmp_path / "killed", pause=0.0)
    found = third.train(training(NextToken()))
    assert expected.overlay.keys() == found.overlay.keys()
    assert all(torch.equal(expected.overlay[name], found.overlay[name]) for name in expected.overlay)
    third.remove()
    assert not (tmp_path / "killed").exists()


def test_students_are_stored(pruned: Student, tmp_path: Path) -> None:
    changed = pruned.with_overlay({pruned.name(Role.ROUTER, 1): torch.ones(16, 256)})
    for name, student in {"pruned": pruned, "changed": changed}.items():
        store_student(student, tmp_path / name)
        loaded = load_student(student.source, tmp_path / name)
        assert loaded.experts == student.experts
        assert torch.equal(loaded.tensor(Role.ROUTER, 1), student.tensor(Role.ROUTER, 1))


def test_every_arm_is_run_with_every_seed_after_its_learning_rates_were_tried() -> None:
    runs = all_runs()
    assert len({run.file_name for run in runs}) == len(runs)
    trained = [run for run in runs if run.n_blocks == LADDER_BLOCKS]
    assert all(run.student == ARMS[run.arm].student for run in trained)
    assert {(run.arm, run.seed) for run in trained} == {
        (arm.name, seed) for arm in ARMS.values() if arm.name != NONE for seed in SEEDS[: arm.n_seeds]
    }
    for arm, paces in SWEEP.items():
        tried = [place for place, run in enumerate(runs) if run.is_sweep and run.arm == arm]
        assert {Pace(runs[place].learning_rate, runs[place].blocks_per_step) for place in tried} == set(paces)
        assert ARMS[arm].pace in paces
        first = next(place for place, run in enumerate(runs) if run.arm == arm and run.n_blocks == LADDER_BLOCKS)
        assert max(tried) < first


def _measured(arm: str, seed: int, divergence: float | None, n_blocks: int = LADDER_BLOCKS) -> Measured:
    run = Run("fine", PRUNED, arm, ARMS[arm].pace.learning_rate, ARMS[arm].pace.blocks_per_step, n_blocks, seed)
    perplexity = None if divergence is None else round(40 + 50 * divergence, 3)
    return Measured(run, divergence, perplexity, divergence, 24_576, 393_216, 300.0, 500_400_000)


_UNTAUGHT = [
    replace(one, run=replace(one.run, student=student))
    for divergence, student in ((1.0, PRUNED), (-1e-7, UNCHANGED), (0.36, ALL_EXPERTS_ON))
    for one in (_measured(NONE, 0, divergence, 0),)
]
_TAUGHT = [
    *(_measured(ROUTER_KD, seed, divergence) for seed, divergence in enumerate((0.59, 0.60, 0.61))),
    *(_measured(FULL_VOCABULARY, seed, divergence) for seed, divergence in enumerate((0.58, 0.59))),
    _measured("router: layer-local", 0, 1.5),
    _measured("router + all experts: KD", 0, None),
]
_SHORT = [
    replace(one, run=replace(one.run, model=model))
    for model, after in (("fine", 0.7), ("coarse", 0.9))
    for one in (_measured(ROUTER_KD, 0, after, SHORT_BLOCKS), _measured(NONE, 0, 1.0, 0))
]
_SWEEP = [
    replace(_measured(ROUTER_KD, 0, 0.8, SWEEP_BLOCKS), run=Run("fine", PRUNED, ROUTER_KD, *pace, SWEEP_BLOCKS, 0))
    for pace in (astuple(ARMS[ROUTER_KD].pace), (1.0, 8))
]
_ALL = [*_UNTAUGHT, *_TAUGHT, *_SHORT[:1], *_SHORT[2:], *_SWEEP]


def test_the_ladder_is_sorted_and_counts_what_is_closed() -> None:
    found = ladder(_ALL, PRUNED)
    assert [taught.run.arm for taught in found[:3]] == [FULL_VOCABULARY, ROUTER_KD, "router: layer-local"]
    assert [taught.accepted for taught in found] == [True, True, False, False]
    assert found[1].closed == pytest.approx((0.41, 0.40, 0.39))
    assert (found[1].mean("divergence"), found[1].deviation("divergence")) == pytest.approx((0.60, 0.01))
    assert found[2].deviation("divergence") is None
    assert found[3].diverged
    assert ladder(_ALL, DENSE) == []


def test_the_csv_file_holds_everything(tmp_path: Path) -> None:
    write_csv(_ALL, tmp_path / "recovery.csv")
    assert read(tmp_path / "recovery.csv") == _ALL


def test_the_tables_say_what_was_measured(tmp_path: Path) -> None:
    write_markdown(_ALL, tmp_path / "recovery.md")
    lines = (tmp_path / "recovery.md").read_text().splitlines()
    pace = ARMS[ROUTER_KD].pace
    figures = "70.00 | 0.6000 ± 0.0100 | 40.0% | 0.6000 | yes | 24,576 | 0.4 | 300 | 500 |"
    assert f"| {ROUTER_KD} | 3 | {pace.learning_rate:g} | {pace.blocks_per_step} | {figures}" in lines
    assert any(line.startswith("| router + all experts: KD | 1 |") and "| diverged |" in line for line in lines)
    # both seeds that both were run with: 0.595 against 0.585
    assert any(
        "reach a KL of 0.5950; from its full vocabulary 0.5850: a difference of +1.71%." in line for line in lines
    )
    assert "| *the original* | - | - | - | 40.00 | 0.0000 | - | 0.0000 | - | - | - | - | - |" in lines
    assert "| *the original, all experts on* | - | - | - | 58.00 | 0.3600 | - | 0.3600 | - | - | - | - | - |" in lines
    assert "| pruned | coarse | 1 | 1.0000 | 0.9000 | 10.0% |" in lines
    assert f"| {ROUTER_KD} | **{pace.learning_rate:g}** | {pace.blocks_per_step} | 0.8000 |" in lines
    assert f"| {ROUTER_KD} | 1 | 8 | 0.8000 |" in lines
