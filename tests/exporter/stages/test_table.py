"""The declarations of the stages: they agree with each other, and a stage cannot open what it does not declare."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from exporter.file_names import BLOCKS, GENERATION, GGUF_FILE, ONNX_FOLDER, ORIGINAL_VALUES, STATISTICS
from exporter.pipeline.order import needs
from exporter.processes.progress import Progress
from exporter.stages.table import ALL_STAGES, CALIBRATE, GGUF, OF_THE_RUN, SCHEDULING, TEACHER_TEXTS, VALIDATE_GGUF
from exporter.work.directory import UndeclaredFileError, WorkDirectory
from exporter.work.stage import Stage, StageContext, files_of

_NAMES = [stage.name for stage in ALL_STAGES]


@pytest.mark.parametrize("stage", ALL_STAGES, ids=_NAMES)
def test_every_stage_has_a_function_that_runs_it(stage: Stage) -> None:
    module = importlib.import_module(f"exporter.stages.{stage.module}")
    assert stage.name in module.__all__
    (parameter,) = inspect.signature(getattr(module, stage.name), eval_str=True).parameters.values()
    assert parameter.annotation is StageContext
    assert stage.version >= 1
    assert stage.what


def test_every_stage_stands_once() -> None:
    assert len(set(_NAMES)) == len(_NAMES)


@pytest.mark.parametrize("stage", ALL_STAGES, ids=_NAMES)
def test_every_file_is_written_by_the_stage_that_it_is_read_from_and_before(stage: Stage) -> None:
    writers = {other.name: other for other in ALL_STAGES[: _NAMES.index(stage.name)]}
    for writer, file in stage.reads | stage.is_helped_by:
        assert file in writers[writer].writes, file.name
    assert stage.rewrites <= stage.reads


def test_a_stage_needs_those_that_write_or_change_what_it_reads() -> None:
    assert needs(CALIBRATE) == ()
    assert needs(GGUF) == ("calibrate", "sensitivity", "compress", "recover")
    assert needs(VALIDATE_GGUF) == ("calibrate", "compress", "gguf", "retune", "validate_written")


_READS = files_of("calibrate", BLOCKS) | files_of("gguf", GGUF_FILE)


@pytest.mark.parametrize(("stage", "file"), [("calibrate", STATISTICS), ("compress", STATISTICS), ("onnx", BLOCKS)])
def test_what_is_not_declared_is_not_opened(tmp_path: Path, stage: str, file: object) -> None:
    work = WorkDirectory(tmp_path).opening(_READS)
    for open_it in (work.path, work.paths):
        with pytest.raises(UndeclaredFileError, match=f"of stage {stage} is not declared"):
            open_it(stage, file)  # type: ignore[operator]


def test_what_is_declared_is_opened(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path).opening(_READS)
    assert work.path("calibrate", BLOCKS) == tmp_path / "calibrate" / "blocks.safetensors"
    (tmp_path / "gguf").mkdir()
    for name in ("a.gguf", "b.json"):
        (tmp_path / "gguf" / name).touch()
    assert work.paths("gguf", GGUF_FILE) == [tmp_path / "gguf" / "a.gguf"]
    assert work.stage("gguf") == tmp_path / "gguf"
    with pytest.raises(UndeclaredFileError, match="a file of stage onnx is not declared"):
        work.stage("onnx")


def test_a_stage_within_a_stage_opens_no_more_of_the_run_than_the_outer_one(tmp_path: Path) -> None:
    outer = WorkDirectory(tmp_path).opening(_READS)
    inner = outer.within(tmp_path / "inner", OF_THE_RUN)
    assert inner.path("calibrate", BLOCKS) == tmp_path / "calibrate" / "blocks.safetensors"
    assert inner.path("onnx", ONNX_FOLDER) == tmp_path / "inner" / "onnx" / "onnx"
    for work in (inner, inner.opening(files_of("calibrate", STATISTICS))):
        with pytest.raises(UndeclaredFileError, match="statistics of stage calibrate"):
            work.path("calibrate", STATISTICS)
    with pytest.raises(UndeclaredFileError, match=r"blocks\.safetensors of stage calibrate"):
        inner.opening(frozenset()).path("calibrate", BLOCKS)


def _context(stage: Stage, folder: Path) -> StageContext:
    return StageContext.of(stage, None, WorkDirectory(folder), Progress())  # type: ignore[arg-type]


def test_a_stage_writes_what_it_declares(tmp_path: Path) -> None:
    context = _context(GGUF, tmp_path)
    assert context.file(GGUF_FILE, name="toy") == tmp_path / "gguf.partial" / "toy.gguf"
    assert context.file(ORIGINAL_VALUES).parent == context.output
    with pytest.raises(UndeclaredFileError, match=r"stage gguf writes generation\.json, which it does not declare"):
        context.file(GENERATION)


@pytest.mark.parametrize("stage", [SCHEDULING, TEACHER_TEXTS, VALIDATE_GGUF], ids=lambda stage: stage.name)
def test_every_context_opens_the_stage_s_own_files_alone(tmp_path: Path, stage: Stage) -> None:
    for writer, file in {(other.name, file) for other in ALL_STAGES for file in other.writes}:
        if (writer, file) in stage.reads | stage.is_helped_by:
            _context(stage, tmp_path).work.paths(writer, file)
        else:
            with pytest.raises(UndeclaredFileError):
                _context(stage, tmp_path).work.paths(writer, file)
