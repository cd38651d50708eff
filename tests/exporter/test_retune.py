"""Routers taught beside quantized experts: in every file and in the student, or in none of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressors.model.families import Role
from compressors.model.student import Student
from exporter.gguf.metadata import gguf_file_name
from exporter.gguf.writer import write_gguf
from exporter.job import Flags
from exporter.onnx.writer import write_onnx
from exporter.pipeline import fingerprints, stages_of
from exporter.plan import Plan
from exporter.progress import Progress
from exporter.recipe import Recipe, RungChoice
from exporter.recovery import AFTER_QUANTIZING
from exporter.result import final_recipe
from exporter.run import make_plan
from exporter.source_state import SourceState
from exporter.stage import StageContext
from exporter.stages import calibrate, compress, gguf, onnx, recover, retune, schedule
from exporter.stages.artifacts import importance_of, open_student
from exporter.work import WorkDirectory

pytestmark = pytest.mark.usefixtures("torch_left_as_it_was")

_RUNG = RungChoice(scope="router", blocks=6, blocks_per_step=2, learning_rate=3e-3)


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
    """Half of the experts by REAP, in Q4_0; no router is taught before they are written."""
    calibration, text = small_texts
    choices = {"budget": "90MB", "budget_kind": "file", "quant": "Q4_0", "context": 512, "threads": 1}
    job = Flags(model=str(toy_model), calibration=calibration, text=text, experts=16, recover="none", **choices).job()
    plan = _planned(make_plan(job, "moe-export"), after_quantizing=_RUNG.model_dump())
    work = WorkDirectory(tmp_path_factory.mktemp("retune"))
    for stage in (calibrate, compress, schedule, recover, gguf, onnx):
        folder = work.folder / stage.__name__.rsplit(".", 1)[1]
        folder.mkdir()
        stage.run(StageContext(plan, work, folder, Progress(silent=True)))
    return _Written(plan, work.folder)


def _planned(plan: Plan, **recover: Any) -> Plan:
    recipe = plan.recipe.model_dump()
    recipe["recover"] |= recover
    recipe["text"] |= {"calibration_blocks": 6, "selection_blocks": 1, "heldout_chunks_per_file": 1}
    return replace(plan, recipe=Recipe.model_validate(recipe))


def _run(plan: Plan, work: WorkDirectory) -> Mapping[str, Any]:
    """Runs the stage where an attempt before may have been; its one result."""
    folder = work.stage("retune")
    folder.mkdir(exist_ok=True)
    retune.run(StageContext(plan, work, folder, Progress(silent=True)))
    (result,) = json.loads((folder / "recovery.json").read_text(encoding="utf-8"))
    return result


def _files(work: WorkDirectory) -> dict[str, bytes]:
    paths = [*work.stage("gguf").glob("*.gguf"), *(work.stage("onnx") / "onnx").glob("model.onnx*")]
    return {path.name: path.read_bytes() for path in paths}


def _written_from_scratch(plan: Plan, work: WorkDirectory, student: Student, folder: Path) -> dict[str, bytes]:
    """What the writers make of a student."""
    importance = importance_of(student, work)
    name = gguf_file_name(plan.recipe.source.model, student.shape, "Q4_0")
    folder.mkdir()
    path = folder / name
    write_gguf(student, "Q4_0", path, importance=importance, name=plan.recipe.source.model, threads=1)
    write_onnx(student, "Q4_0", folder, importance=importance, threads=1)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_kept_routers_are_in_every_file_and_in_the_student(written: _Written, tmp_path: Path) -> None:
    plan, work = written.plan, written.copy(tmp_path / "work")
    before = _files(work)
    assert len(before) == 3
    result = _run(plan, work)
    assert result["rung"] == AFTER_QUANTIZING
    assert result["accepted"]
    assert result["selection_kld_after"] < result["selection_kld_before"]
    assert result["tokens"] == 6 * 512
    student, untaught = open_student(plan, work), open_student(plan, work, "recover")
    for layer in range(2):
        routers = [it.tensor(Role.ROUTER, layer) for it in (student, untaught)]
        assert not torch.equal(routers[0], routers[1].float())
    after = _files(work)
    assert after != before
    assert after == _written_from_scratch(plan, work, student, tmp_path / "expected")
    assert _run(plan, work) == result  # again, on files that hold them already
    assert _files(work) == after


def test_rejected_routers_leave_the_files_as_they_were_written(written: _Written, tmp_path: Path) -> None:
    """Even where an attempt before put others into them."""
    work = written.copy(tmp_path / "work")
    before = _files(work)
    assert _run(written.plan, work)["accepted"]
    assert _files(work) != before
    shutil.rmtree(work.stage("retune"))
    hopeless = _planned(written.plan, after_quantizing=_RUNG.model_dump() | {"learning_rate": 30.0})
    result = _run(hopeless, work)
    assert not result["accepted"]
    assert _files(work) == before
    found, untaught = (open_student(hopeless, work, stage).tensor(Role.ROUTER, 1) for stage in ("retune", "recover"))
    assert torch.equal(found, untaught)


def test_a_stage_that_was_stopped_goes_on_and_trains_nothing_twice(
    written: _Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, uninterrupted = written.copy(tmp_path / "work"), written.copy(tmp_path / "uninterrupted")
    expected = _run(written.plan, uninterrupted)
    really_rewrite, n_files = retune.rewrite_routers, 0

    def stop_before_the_second(*arguments: Any) -> None:
        nonlocal n_files
        n_files += 1
        if n_files == 2:
            raise KeyboardInterrupt
        really_rewrite(*arguments)

    monkeypatch.setattr(retune, "rewrite_routers", stop_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        _run(written.plan, work)
    assert _files(work) != _files(uninterrupted)
    monkeypatch.undo()
    monkeypatch.setattr(recover, "training_of", None)  # it would fail
    result = _run(written.plan, work)
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}
    assert _files(work) == _files(uninterrupted)


def test_without_gguf_the_onnx_folder_is_what_routers_are_taught_with(written: _Written, tmp_path: Path) -> None:
    """Its embedding has other types than llama.cpp's Q4_0 gives it, so it starts, and ends, somewhere else."""
    work, alone = written.copy(tmp_path / "work"), written.copy(tmp_path / "alone")
    both = _run(written.plan, work)
    result = _run(replace(written.plan, recipe=written.plan.recipe.model_copy(update={"gguf": None})), alone)
    assert result["selection_kld_after"] < result["selection_kld_before"]
    assert result["selection_kld_before"] != both["selection_kld_before"]
    data = {name: file for name, file in _files(work).items() if name.startswith("model")}
    assert {name: file for name, file in _files(alone).items() if name.startswith("model")} != data


def test_switching_it_off_or_on_writes_the_files_anew(written: _Written) -> None:
    """So no file keeps routers of an attempt with other choices."""
    source = SourceState.of(written.plan.source)
    off = _planned(written.plan, after_quantizing=None)
    before, after = (fingerprints(plan, stages_of(plan), source) for plan in (off, written.plan))
    assert set(after) - set(before) == {"retune"}
    different = {name for name in before if before[name] != after[name]}
    assert {"gguf", "onnx", "validate_torch", "validate_gguf", "validate_onnx"} <= different


def test_the_final_recipe_says_how_many_blocks_there_were(written: _Written) -> None:
    work = WorkDirectory(written.folder)
    assert final_recipe(written.plan, work).recover == written.plan.recipe.recover
