"""Files of a checkpoint in float8 equal files of its dequantized copy, in every form that the hub has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE
from exporter.writing.onnx.writer import write_onnx
from tests.float8_checkpoints import SCHEMES, write_float8


@pytest.fixture(params=["Qwen", "compressed-tensors, rows", "compressed-tensors, blocks", "AutoFP8"])
def students(
    request: pytest.FixtureRequest, toy_checkpoint: Callable[..., Path], tmp_path: Path
) -> tuple[Student, Student]:
    """Eight experts of one layer, in float8 and dequantized."""
    toy = toy_checkpoint(tmp_path, n_layers=1)
    write_float8(toy, tmp_path / "fp8", tmp_path / "plain", SCHEMES[request.param])
    experts = ExpertMap.keeping(32, [tuple(range(0, 32, 4))])
    return Student(open_source(tmp_path / "fp8"), experts), Student(open_source(tmp_path / "plain"), experts)


def test_files_have_the_same_bytes(students: tuple[Student, Student], tmp_path: Path) -> None:
    for name, student in zip(("fp8", "plain"), students, strict=True):
        write_gguf(student, "Q8_0", tmp_path / f"{name}.gguf", name="x", threads=1)
        write_onnx(student, "Q4_0", tmp_path / f"{name} onnx", threads=1)
    assert (tmp_path / "fp8.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    for file in (MODEL_FILE, DATA_FILE):
        assert (tmp_path / "fp8 onnx" / file).read_bytes() == (tmp_path / "plain onnx" / file).read_bytes()
