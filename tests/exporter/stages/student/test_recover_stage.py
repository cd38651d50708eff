"""The recovery ladder in its stage: what is kept, what is rejected and why, and that nothing is trained twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressors.model.description.roles import Role
from compressors.model.sources.student import Student
from compressors.recover.divergence import Judgement
from exporter.planning.job import Flags
from exporter.planning.plan import Plan
from exporter.planning.plan_making import make_plan
from exporter.planning.rates import rates_for
from exporter.planning.recipe import Recipe
from exporter.stages.inputs import open_student
from exporter.stages.student import recover
from exporter.stages.table import CALIBRATE, COMPRESS, RECOVER, SCHEDULING
from exporter.work.directory import WorkDirectory
from exporter.work.snapshot import Snapshot
from exporter.work.stage import Stage, StageContext
from tests.exporter.stage_runs import run_stage

pytestmark = pytest.mark.usefixtures("torch_left_as_it_was")

_ROUTER = {"scope": "router", "blocks": 6, "blocks_per_step": 2, "learning_rate": 3e-3}
_EXPERTS = _ROUTER | {"scope": "experts", "learning_rate": 1e-3}


@dataclass(frozen=True)
class _Compressed:
    """A work directory of a pruned model that nothing was taught yet."""

    plan: Plan
    folder: Path

    def climb(self, folder: Path, *rungs: dict[str, Any], memory_bytes: int | None = None) -> _Climbed:
        """Runs ``schedule`` and ``recover`` with these rungs in a copy of the work."""
        shutil.copytree(self.folder, folder)
        plan = _with_rungs(self.plan, *rungs)
        climbed = _Climbed(plan if memory_bytes is None else replace(plan, memory_bytes=memory_bytes), folder)
        climbed.run(SCHEDULING)
        climbed.run(RECOVER)
        return climbed


@dataclass(frozen=True)
class _Climbed:
    plan: Plan
    folder: Path

    def run(self, stage: Stage) -> None:
        run_stage(stage, self.plan, WorkDirectory(self.folder))

    @property
    def results(self) -> Sequence[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.folder / "recover" / "recovery.json").read_text())
        return found

    def student(self, stage: str = "recover") -> Student:
        return open_student(self.plan, WorkDirectory(self.folder), stage)


@pytest.fixture(scope="module")
def compressed(
    tmp_path_factory: pytest.TempPathFactory, toy_model: Path, small_texts: tuple[Path, Path]
) -> _Compressed:
    """Half of the experts by REAP."""
    calibration, text = small_texts
    choices = {"budget": "90MB", "budget_kind": "file", "context": 512, "threads": 1, "recover": "none"}
    plan = make_plan(
        Flags(model=str(toy_model), calibration=calibration, text=text, experts=16, **choices).job(), "moe-export"
    )
    recipe = plan.recipe.model_dump()
    recipe["text"] |= {"calibration_blocks": 6, "selection_blocks": 1, "heldout_chunks_per_file": 1}
    plan = replace(plan, recipe=Recipe.model_validate(recipe), recover_seconds=0, may_train=True)
    climbed = _Climbed(plan, tmp_path_factory.mktemp("recover"))
    for stage in (CALIBRATE, COMPRESS):
        climbed.run(stage)
    return _Compressed(plan, climbed.folder)


def _with_rungs(plan: Plan, *rungs: dict[str, Any]) -> Plan:
    recipe = plan.recipe.model_dump()
    recipe["recover"]["rungs"] = rungs
    return replace(plan, recipe=Recipe.model_validate(recipe))


def _tensors(student: Student) -> list[torch.Tensor]:
    """A router, and the up projection of an expert of each layer."""
    layers = range(student.spec.n_layers)
    routers = [student.tensor(Role.ROUTER, layer).float() for layer in layers]
    return routers + [student.expert(Role.EXPERT_UP, layer, 3) for layer in layers]


def _equal(first: Student, second: Student) -> list[bool]:
    return [torch.equal(one, two) for one, two in zip(_tensors(first), _tensors(second), strict=True)]


def test_each_rung_goes_on_from_the_last_that_was_kept(compressed: _Compressed, tmp_path: Path) -> None:
    climbed = compressed.climb(tmp_path / "work", _ROUTER, _ROUTER | {"learning_rate": 1e9}, _EXPERTS)
    router, wild, experts = climbed.results
    assert [rung["accepted"] for rung in climbed.results] == [True, False, True]
    assert router["selection_kld_after"] < router["selection_kld_before"]
    assert wild["selection_kld_before"] == experts["selection_kld_before"] == router["selection_kld_after"]
    assert experts["selection_perplexity_before"] == router["selection_perplexity_after"]
    assert _equal(climbed.student(), climbed.student("compress")) == [False] * 4
    only_first = compressed.climb(tmp_path / "first", _ROUTER)
    assert only_first.results[0]["selection_kld_after"] == router["selection_kld_after"]
    assert _equal(only_first.student(), only_first.student("compress")) == [False, False, True, True]


@pytest.mark.parametrize(
    "rung",
    [
        _ROUTER | {"loss": "next-token"},
        _ROUTER | {"loss": "router-logits"},
        _ROUTER | {"scope": "top-experts", "experts": 3, "learning_rate": 1e-3},
        _ROUTER | {"scope": "adapters", "rank": 2},
        _ROUTER | {"scope": "norms"},
        _ROUTER | {"scope": "all", "learning_rate": 1e-3},
        _EXPERTS | {"loss": "ka", "batches_per_round": 1, "blocks": 4},
        _EXPERTS | {"loss": "sar", "batches_per_round": 2, "blocks": 4},
    ],
    ids=lambda rung: f"{rung['scope']}-{rung.get('loss', 'kd')}",
)
def test_every_scope_and_loss_trains_what_it_names(
    compressed: _Compressed, tmp_path: Path, rung: dict[str, Any]
) -> None:
    climbed = compressed.climb(tmp_path / "work", rung)
    (result,) = climbed.results
    assert result["why"] is None
    assert result["accepted"] == (result["selection_kld_after"] < result["selection_kld_before"])
    assert result["tokens"] == rung["blocks"] * 512
    if rung.get("loss", "kd") != "router-logits":  # which says nothing of what the model predicts
        assert result["selection_kld_after"] != result["selection_kld_before"]
    routers_equal = _equal(climbed.student(), climbed.student("compress"))[:2]
    assert routers_equal == [not result["accepted"]] * 2


def test_a_rate_by_the_divergence_is_the_better_of_two_trials(
    compressed: _Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rung = _ROUTER | {"scope": "all", "learning_rate": None}
    monkeypatch.setattr(recover, "trial_blocks", lambda n_blocks, per_step: 4)
    climbed = compressed.climb(tmp_path / "work", rung)
    (result,) = climbed.results
    trials = {path.name: float(path.read_text()) for path in (climbed.folder / "recover").glob("trial-0-*.json")}
    rates = rates_for("all", result["selection_kld_before"], 256)
    assert set(trials) == {f"trial-0-{rate:g}.json" for rate in rates}
    best = min(rates, key=lambda rate: trials[f"trial-0-{rate:g}.json"])
    assert result["learning_rate"] == best
    pinned = compressed.climb(tmp_path / "pinned", rung | {"learning_rate": best})
    assert pinned.results[0]["selection_kld_after"] == result["selection_kld_after"]
    shorter = compressed.climb(tmp_path / "trial", rung | {"learning_rate": best, "blocks": 4})
    assert shorter.results[0]["selection_kld_after"] == min(trials.values()), "a trial is a short rung"
    for left in ("rung-0.json", "rung-0.safetensors"):  # stopped after the trials
        (climbed.folder / "recover" / left).unlink()
    trained: list[int] = []
    really_train = recover.training_of
    monkeypatch.setattr(
        recover, "training_of", lambda *arguments: trained.append(arguments[3]) or really_train(*arguments)
    )
    climbed.run(RECOVER)
    assert trained == [6], "trials are not repeated"
    assert {**climbed.results[0], "seconds": 0} == {**result, "seconds": 0}


def test_training_that_fails_is_rejected_and_harms_nothing(compressed: _Compressed, tmp_path: Path) -> None:
    climbed = compressed.climb(tmp_path / "work", _EXPERTS | {"learning_rate": 1e30})
    (result,) = climbed.results
    assert not result["accepted"]
    assert result["selection_kld_after"] is None
    assert "lower the learning rate" in result["why"]
    assert _equal(climbed.student(), climbed.student("compress")) == [True] * 4


def test_a_rung_that_does_not_fit_the_memory_is_rejected_where_it_was_forced(
    compressed: _Compressed, tmp_path: Path
) -> None:
    climbed = compressed.climb(tmp_path / "work", _EXPERTS, _ROUTER, memory_bytes=1)
    experts, router = climbed.results
    assert "needs" in experts["why"]
    assert "GB of memory" in experts["why"]
    assert not experts["accepted"]
    assert router["accepted"]


def test_rungs_that_are_done_are_not_climbed_again(
    compressed: _Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    climbed = compressed.climb(tmp_path / "work", _ROUTER, _EXPERTS)
    expected, student = climbed.results, _tensors(climbed.student())
    (climbed.folder / "recover" / "rung-1.json").unlink()  # stopped while the second was judged
    (climbed.folder / "recover" / "recovery.json").unlink()
    climbed.run(RECOVER)
    first, second = climbed.results
    assert first == expected[0]
    assert {**second, "seconds": 0} == {**expected[1], "seconds": 0}
    assert all(map(torch.equal, _tensors(climbed.student()), student))
    monkeypatch.setattr(recover, "training_of", None)  # it would fail
    climbed.run(RECOVER)
    assert climbed.results == [first, second]


def test_a_rung_that_was_taught_is_only_judged_again(
    compressed: _Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after training: its tensors are there, the snapshot of the last step but one too."""
    kept: list[int] = []

    class EachStep(Snapshot):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder, seconds=0)

        def keep(self, position: int, write: Callable[[Path], None]) -> None:
            kept.append(position)
            super().keep(position, write)

    def killed(context: StageContext, student: Student) -> Judgement:
        if any((tmp_path / "work").rglob("snapshot-0")):
            raise KeyboardInterrupt
        return really_judge(context, student)

    really_judge = recover.judge_on_selection
    with monkeypatch.context() as patched:
        patched.setattr(recover, "Snapshot", EachStep)
        patched.setattr(recover, "judge_on_selection", killed)
        with pytest.raises(KeyboardInterrupt):
            compressed.climb(tmp_path / "work", _ROUTER)
    assert kept == [1, 2], "of 3 steps"
    monkeypatch.setattr(recover, "training_of", None)  # it would fail
    again = _Climbed(_with_rungs(compressed.plan, _ROUTER), tmp_path / "work")
    again.run(RECOVER)
    monkeypatch.undo()
    uninterrupted = compressed.climb(tmp_path / "whole", _ROUTER)
    (found,), (expected,) = again.results, uninterrupted.results
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert all(_equal(again.student(), uninterrupted.student()))
    assert not [path.name for path in again.folder.rglob("*") if "snapshot" in path.name or path.suffix == ".partial"]
