"""Validation of scaled rotary embeddings: the model's passes, and any other is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE, plan_tensors
from exporter.writing.onnx.writer import write_onnx
from tests.altered import altered
from validate.files.file_facts import onnx_facts
from validate.files.gguf_settings import gguf_setting_symptoms
from validate.files.graph_settings import graph_setting_symptoms
from validate.files.rope_factors import rope_factor_symptoms
from validate.metrics.symptoms import setting_symptoms

_ORIGINAL = {"original_max_position_embeddings": 256}
_SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "attention_factor": 1.3, **_ORIGINAL},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
    "longrope": {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, **_ORIGINAL},
}


@pytest.fixture(params=_SCALINGS)
def student(request: pytest.FixtureRequest, toy_checkpoint: Callable[..., Path], tmp_path: Path) -> Student:
    """One layer of the Mixtral, said to be scaled."""
    folder = toy_checkpoint(tmp_path, n_layers=1, model="coarse")
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": request.param, **_SCALINGS[request.param]}
    (folder / "config.json").write_text(json.dumps(config))
    return Student.teacher(open_source(folder))


def test_the_model_s_own_scaling_is_no_symptom_and_another_s_is(student: Student, tmp_path: Path) -> None:
    write_gguf(student, "Q8_0", tmp_path / "model.gguf", name="toy", threads=1)
    write_onnx(student, "Q4_0", tmp_path / "onnx", threads=1)
    file, graph = GgufFile(tmp_path / "model.gguf"), tmp_path / "onnx" / MODEL_FILE

    def symptoms(theta: float, factor: float) -> tuple[list[str], list[str]]:
        rope = student.spec.rope
        factors = {
            name: tuple(factor * value for value in getattr(rope, name)) for name in ("short_factors", "long_factors")
        }
        spec = altered(student.spec, rope=replace(rope, theta=theta, factor=factor * rope.factor, **factors))
        in_gguf = [*gguf_setting_symptoms(file.metadata, spec), *rope_factor_symptoms(file, spec)]
        return in_gguf, [*setting_symptoms(onnx_facts(graph), spec), *graph_setting_symptoms(graph, spec)]

    assert symptoms(student.spec.rope.theta, 1.0) == ([], [])
    assert all(symptoms(student.spec.rope.theta, 2.0))
    assert all(symptoms(7 * student.spec.rope.theta, 1.0))


def test_damaged_factors_and_tables_are_named(student: Student, tmp_path: Path) -> None:
    write_gguf(student, "Q8_0", tmp_path / "model.gguf", name="toy", threads=1)
    file = GgufFile(tmp_path / "model.gguf")
    for name in [name for name in file.tensors if name.startswith("rope_")]:
        with (tmp_path / "model.gguf").open("r+b") as stream:
            stream.seek(file.tensors[name].offset)
            stream.write(np.full(16, 3.0, np.float32).tobytes())
        damaged = GgufFile(tmp_path / "model.gguf")
        assert any(name in symptom for symptom in rope_factor_symptoms(damaged, student.spec))
    write_onnx(student, "Q4_0", tmp_path / "onnx", threads=1)
    _, table = plan_tensors(student.spec, "Q4_0").rotary
    last = table.offset + table.n_bytes - 4
    with (tmp_path / "onnx" / DATA_FILE).open("r+b") as stream:
        stream.seek(last)
        stream.write(np.float32(0.5).tobytes())
    (symptom,) = graph_setting_symptoms(tmp_path / "onnx" / MODEL_FILE, student.spec)
    assert f"rotary table rotary.sine: 0.50000 at position {table.shape[0] - 1}" in symptom
