"""Routers, norms and block scales taught beside the codes of the written files, and put into them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressors.model.description.roles import Role
from compressors.model.sources.student import Student
from compressors.model.sources.weights import WrittenWeights
from compressors.recover.divergence import judge
from exporter.file_names import SELECTION_PREDICTIONS
from exporter.pipeline.order import fingerprints, stages_of
from exporter.planning.job import Flags
from exporter.planning.plan import Plan
from exporter.planning.plan_making import make_plan
from exporter.planning.recipe import FileChoice, Recipe, RungChoice
from exporter.publishing.result import final_recipe
from exporter.stages.files import retune
from exporter.stages.inputs import open_student, teacher_predictions, token_blocks, written_weights
from exporter.stages.student import recover
from exporter.stages.table import CALIBRATE, COMPRESS, GGUF, ONNX, RECOVER, RETUNE, SCHEDULING
from exporter.work.directory import WorkDirectory
from exporter.work.input_state import SourceState
from tests.exporter.stage_runs import run_stage
from validate.runtimes.backend import scored_positions

pytestmark = pytest.mark.usefixtures("torch_left_as_it_was")

_RUNG = RungChoice(scope="scales", blocks=6, blocks_per_step=2, learning_rate=3e-3)


@dataclass(frozen=True)
class _Written:
    """A work directory in which everything is done but ``retune``."""

    plan: Plan
    folder: Path

    def copy(self, folder: Path) -> WorkDirectory:
        shutil.copytree(self.folder, folder)
        return WorkDirectory(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, small_texts: tuple[Path, Path]) -> _Written:
    """Half of the experts by REAP, in the Q4_0 of both containers; no router is taught before they are written."""
    calibration, text = small_texts
    choices = {"budget": "90MB", "budget_kind": "file", "quant": "Q4_0", "context": 512, "threads": 1}
    job = Flags(model=str(toy_model), calibration=calibration, text=text, experts=16, recover="none", **choices).job()
    plan = _planned(make_plan(job, "moe-export"), after_quantizing=_RUNG.model_dump())
    work = WorkDirectory(tmp_path_factory.mktemp("retune"))
    for stage in (CALIBRATE, COMPRESS, SCHEDULING, RECOVER, GGUF, ONNX):
        run_stage(stage, plan, work)
    return _Written(plan, work.folder)


def _planned(plan: Plan, **recover: Any) -> Plan:
    """With other choices of recovery, and so written that both files hold the same numbers."""
    recipe = plan.recipe.model_dump()
    recipe["gguf"] = {"mix": "Q4_0", "tensors": {"token_embd.weight": "Q8_0"}, "quantizer": "kernel"}
    recipe["onnx"] = {"mix": "Q4_0", "quantizer": "kernel"}
    recipe["recover"] |= recover
    recipe["text"] |= {"calibration_blocks": 6, "selection_blocks": 1, "heldout_chunks_per_file": 1}
    return replace(plan, recipe=Recipe.model_validate(recipe))


def _results(plan: Plan, work: WorkDirectory) -> list[Mapping[str, Any]]:
    run_stage(RETUNE, plan, work)
    results: list[Mapping[str, Any]] = json.loads((work.stage("retune") / "recovery.json").read_text(encoding="utf-8"))
    return results


def _run(plan: Plan, work: WorkDirectory) -> Mapping[str, Any]:
    """The one result of files that hold the same numbers."""
    (result,) = _results(plan, work)
    return result


def _files(work: WorkDirectory) -> dict[str, bytes]:
    paths = [*work.stage("gguf").glob("*.gguf"), *(work.stage("onnx") / "onnx").glob("model.onnx*")]
    return {path.name: path.read_bytes() for path in paths}


def _numbers(weights: WrittenWeights, student: Student) -> list[torch.Tensor]:
    """Some of what a file holds, by each kind."""
    written = student.as_written(weights)
    return [
        written.tensor(Role.ROUTER, 1),
        written.tensor(Role.FINAL_NORM),
        written.tensor(Role.KEY_NORM, 0),
        written.tensor(Role.QUERY, 1),
        written.expert(Role.EXPERT_UP, 0, 5),
        written.expert(Role.EXPERT_DOWN, 1, 2),
    ]


@pytest.mark.parametrize(("scope", "n_changed"), [("router", 1), ("norms", 3), ("scales", 6)])
def test_what_is_kept_is_in_every_file_of_the_same_numbers(
    written: _Written, tmp_path: Path, scope: str, n_changed: int
) -> None:
    plan, work = (
        _planned(written.plan, after_quantizing=_RUNG.model_dump() | {"scope": scope}),
        written.copy(tmp_path / "work"),
    )
    before = _files(work)
    assert len(before) == 3
    student = open_student(plan, work)
    numbers = [_numbers(weights, student) for weights in written_weights(plan, work, student.spec).values()]
    result = _run(plan, work)
    assert result["rung"].endswith(", beside the codes of gguf and onnx")
    assert result["accepted"]
    assert result["selection_kld_after"] < result["selection_kld_before"]
    assert result["tokens"] == 6 * 512
    after = [_numbers(weights, student) for weights in written_weights(plan, work, student.spec).values()]
    assert all(map(torch.equal, *after)), "both hold the same"
    assert sum(not torch.equal(one, other) for one, other in zip(numbers[0], after[0], strict=True)) == n_changed
    files = _files(work)
    assert [len(file) for file in files.values()] == [len(file) for file in before.values()]
    assert _judged(plan, work, "gguf") == result["selection_kld_after"], "as the file is now"
    assert _run(plan, work) == result  # again, on files that hold it already
    assert _files(work) == files


def _judged(plan: Plan, work: WorkDirectory, artifact: str) -> float:
    """The divergence on the selection split of the numbers that a file holds."""
    student = open_student(plan, work)
    weights, blocks_BT = written_weights(plan, work, student.spec)[artifact], token_blocks(work).selection
    known = teacher_predictions(plan, work, SELECTION_PREDICTIONS)
    scored = scored_positions(blocks_BT.shape[1])
    return judge(student.as_written(weights), blocks_BT, known, scored).divergence


def test_files_of_different_numbers_are_taught_by_themselves(written: _Written, tmp_path: Path) -> None:
    work = written.copy(tmp_path / "work")
    q4_k = FileChoice(mix="Q4_K_S", quantizer="kernel")
    plan = replace(written.plan, recipe=written.plan.recipe.model_copy(update={"gguf": q4_k}))
    shutil.rmtree(work.stage("gguf"))
    run_stage(GGUF, plan, work)
    student = open_student(plan, work)
    results = _results(plan, work)
    assert [result["rung"].rsplit(" ", 1)[1] for result in results] == ["gguf", "onnx"]
    for artifact, result in zip(("gguf", "onnx"), results, strict=True):
        assert result["accepted"]
        assert _judged(plan, work, artifact) == result["selection_kld_after"]
    routers = [weights.tunable(Role.ROUTER, 1) for weights in written_weights(plan, work, student.spec).values()]
    assert not torch.equal(*routers)
    assert torch.equal(student.tensor(Role.ROUTER, 1), open_student(plan, work, "compress").tensor(Role.ROUTER, 1))


def test_what_is_rejected_leaves_the_files_as_they_were_written(written: _Written, tmp_path: Path) -> None:
    """Even where an attempt before put other values into them."""
    work = written.copy(tmp_path / "work")
    before = _files(work)
    assert _run(written.plan, work)["accepted"]
    assert _files(work) != before
    shutil.rmtree(work.stage("retune"))
    hopeless = _planned(written.plan, after_quantizing=_RUNG.model_dump() | {"learning_rate": 30.0})
    result = _run(hopeless, work)
    assert not result["accepted"]
    assert _files(work) == before


def test_a_stage_that_was_stopped_goes_on_and_trains_nothing_twice(
    written: _Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, uninterrupted = written.copy(tmp_path / "work"), written.copy(tmp_path / "uninterrupted")
    expected = _run(written.plan, uninterrupted)
    really_rewrite, n_files = retune.rewrite, 0

    def stop_before_the_second(*arguments: Any) -> None:
        nonlocal n_files
        n_files += 1
        if n_files == 2:
            raise KeyboardInterrupt
        really_rewrite(*arguments)

    monkeypatch.setattr(retune, "rewrite", stop_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        _run(written.plan, work)
    assert _files(work) != _files(uninterrupted)
    monkeypatch.undo()
    monkeypatch.setattr(recover, "training_of", None)  # it would fail
    result = _run(written.plan, work)
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}
    assert _files(work) == _files(uninterrupted)


def test_without_gguf_the_onnx_folder_is_what_is_taught(written: _Written, tmp_path: Path) -> None:
    """Both hold the same numbers here, so they learn the same."""
    work, alone = written.copy(tmp_path / "work"), written.copy(tmp_path / "alone")
    both = _run(written.plan, work)
    result = _run(replace(written.plan, recipe=written.plan.recipe.model_copy(update={"gguf": None})), alone)
    assert result["selection_kld_after"] == both["selection_kld_after"]
    data = {name: file for name, file in _files(work).items() if name.startswith("model")}
    assert {name: file for name, file in _files(alone).items() if name.startswith("model")} == data


def test_switching_it_off_or_on_writes_the_files_anew(written: _Written) -> None:
    """So no file keeps values of an attempt with other choices."""
    source = SourceState.of(written.plan.source)
    off = _planned(written.plan, after_quantizing=None)
    before, after = (fingerprints(plan, stages_of(plan), source) for plan in (off, written.plan))
    assert set(after) - set(before) == {"retune"}
    different = {name for name in before if before[name] != after[name]}
    assert {"gguf", "onnx", "validate_torch", "validate_gguf", "validate_onnx"} <= different


def test_the_final_recipe_says_how_many_blocks_there_were(written: _Written) -> None:
    work = WorkDirectory(written.folder)
    assert final_recipe(written.plan, work).recover == written.plan.recipe.recover
