"""The inputs of layers while a file is written with error feedback: they go with their layer, and no byte changes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from compressors.calibration.layer_inputs import LayerInputs
from exporter.estimating.disk import disk_by_stage
from exporter.file_names import LAYER_INPUTS, STAGE_FINGERPRINT
from exporter.planning.job import Flags
from exporter.planning.plan import Plan
from exporter.planning.plan_making import make_plan
from exporter.planning.planner import predict_recipe
from exporter.planning.recipe import Recipe
from exporter.stages.table import CALIBRATE, COMPRESS, GGUF, ONNX, RECOVER, SCHEDULING, SENSITIVITY
from exporter.work.directory import StageRecord, WorkDirectory
from exporter.work.stage import Stage
from exporter.writing.resumable import ResumableFile
from tests.exporter.stage_runs import run_stage

pytestmark = pytest.mark.usefixtures("torch_left_as_it_was")

_N_INPUTS = 3  # two layers, and the head


@dataclass(frozen=True)
class _Prepared:
    """A work directory in which nothing but the files is missing."""

    plan: Plan
    folder: Path

    def copy(self, folder: Path) -> WorkDirectory:
        shutil.copytree(self.folder, folder)
        return WorkDirectory(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, small_texts: tuple[Path, Path]) -> _Prepared:
    """All experts stay, and error feedback chooses codes of both files."""
    calibration, text = small_texts
    choices = {"budget": "90MB", "budget_kind": "file", "quant": "Q4_0", "context": 512, "threads": 1}
    job = Flags(model=str(toy_model), calibration=calibration, text=text, quantizer="feedback", **choices).job()
    plan = make_plan(job, "moe-export")
    values = plan.recipe.model_dump()
    values["text"] |= {"calibration_blocks": 1, "selection_blocks": 1, "heldout_chunks_per_file": 1}
    # few codes are chosen, so that it takes no time
    values["gguf"] |= {"mix": "F16", "tensors": {f"blk.{layer}.attn_q.weight": "Q4_0" for layer in range(2)}}
    values["onnx"] |= {"mix": "F32", "tensors": {f"layers.{layer}.q_proj": "Q4_0" for layer in range(2)}}
    recipe = Recipe.model_validate(values)
    plan = replace(plan, recipe=recipe, predictions=predict_recipe(recipe, plan.open_source()))
    work = WorkDirectory(tmp_path_factory.mktemp("feedback"))
    for stage in (CALIBRATE, SENSITIVITY, COMPRESS, SCHEDULING, RECOVER):
        folder = run_stage(stage, plan, work)
        (folder / STAGE_FINGERPRINT).touch()
        folder.rename(work.partial(stage.name))
        work.finish(stage.name, StageRecord("", 0.0, 0))
    return _Prepared(plan, work.folder)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix in (".gguf", ".data")}


def _space(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def expected(prepared: _Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files as they are written from calibration's inputs, which stay."""
    work = prepared.copy(tmp_path_factory.mktemp("expected") / "work")
    files = {
        name: content
        for stage in (GGUF, ONNX)
        for name, content in _bytes(run_stage(stage, prepared.plan, work)).items()
    }
    assert len(list(work.path("calibrate", LAYER_INPUTS).iterdir())) == _N_INPUTS
    return files


def _taken(prepared: _Prepared, stage: Stage, folder: Path) -> WorkDirectory:
    """A copy of the work in which the stage has the inputs for itself, as the last that reads them."""
    work = prepared.copy(folder)
    work.begin(stage.name, "")
    work.hand_over("calibrate", LAYER_INPUTS, stage.name)
    work.partial(stage.name).rename(work.stage(stage.name))
    return work


def _alone(plan: Plan, stage: Stage) -> Plan:
    """The plan of a run that writes one file."""
    other = {"gguf": "onnx", "onnx": "gguf"}[stage.name]
    recipe = plan.recipe.model_copy(update={other: None})
    return replace(plan, recipe=recipe, predictions={stage.name: plan.predictions[stage.name]})


@pytest.mark.parametrize("stage", [GGUF, ONNX], ids=["gguf", "onnx"])
def test_inputs_that_a_file_has_for_itself_go_with_their_layers_as_estimated(
    prepared: _Prepared, expected: dict[str, bytes], stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = _taken(prepared, stage, tmp_path / "work")
    seen: list[tuple[int, int]] = []
    really_record = ResumableFile.record

    def record(file: ResumableFile) -> None:
        really_record(file)
        seen.append((len(list(work.folder.rglob("layer-*.npy"))), _space(work.folder)))

    monkeypatch.setattr(ResumableFile, "record", record)
    folder = run_stage(stage, prepared.plan, work)
    assert _bytes(folder).items() <= expected.items()
    assert sorted((n_inputs for n_inputs, _ in seen), reverse=True) == [3, 2, 1]
    assert not list(work.folder.rglob("layer-*.npy"))
    lines = disk_by_stage(_alone(prepared.plan, stage))[stage.name]
    n_inputs, most = max(seen, key=lambda moment: moment[1])
    of_inputs = n_inputs * 512 * prepared.plan.teacher_spec.hidden_size * 2
    assert lines["layer inputs"] == pytest.approx(of_inputs, rel=0.01)  # a norm is written after them
    assert most == pytest.approx(sum(lines.values()), rel=0.03)


def test_a_file_that_was_interrupted_goes_on_with_the_inputs_that_are_left(
    prepared: _Prepared, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = _taken(prepared, GGUF, tmp_path / "work")
    really_remove = LayerInputs.remove

    def stop(inputs: LayerInputs, layer: int) -> None:
        really_remove(inputs, layer)
        if layer == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(LayerInputs, "remove", stop)
    with pytest.raises(KeyboardInterrupt):
        run_stage(GGUF, prepared.plan, work)
    assert not list(work.folder.rglob("layer-000.npy"))
    assert list(work.folder.rglob("layer-001.npy"))
    monkeypatch.undo()
    assert _bytes(run_stage(GGUF, prepared.plan, work)).items() <= expected.items()


def test_inputs_that_are_gone_are_made_again(prepared: _Prepared, expected: dict[str, bytes], tmp_path: Path) -> None:
    work = prepared.copy(tmp_path / "work")
    work.remove_files("calibrate", [LAYER_INPUTS])
    assert _bytes(run_stage(ONNX, prepared.plan, work)).items() <= expected.items()
    assert not list(work.folder.rglob("layer-*.npy"))
