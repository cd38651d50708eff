"""Compares the facts that files give about themselves with the checkpoint that they were written from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from compressors.model.errors import InputError
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from tests.altered import altered
from validate.files.file_facts import gguf_facts, onnx_facts
from validate.files.model_file import find_model_file
from validate.metrics.symptoms import setting_symptoms


@pytest.fixture(scope="module", params=["fine", "coarse"])
def student(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]
) -> Student:
    """One layer with six experts."""
    source = open_source(toy_checkpoint(tmp_path_factory.mktemp("facts"), n_layers=1, model=request.param))
    return Student(source, ExpertMap.keeping(source.spec.n_experts, [range(6)]))


def test_both_files_tell_what_the_config_says(student: Student, tmp_path: Path) -> None:
    write_gguf(student, "Q4_K_S", tmp_path / "x.gguf", name="x", threads=1)
    write_onnx(student, "Q4_0", tmp_path / "onnx", threads=1)
    spec = student.spec
    in_gguf, in_graph = gguf_facts(tmp_path / "x.gguf"), onnx_facts(tmp_path / "onnx" / "model.onnx")
    for facts in (in_gguf, in_graph):
        assert (facts.n_layers, facts.n_experts, facts.top_k) == (1, 6, spec.top_k)
        assert facts.rope_base == pytest.approx(spec.rope.theta, rel=1e-3)
        assert facts.vocab_size == spec.vocab_size
        assert setting_symptoms(facts, spec) == []
    assert in_graph.bits_per_weight == 4.5
    assert 4.5 <= in_gguf.bits_per_weight <= 5.5, "rows that are no multiple of 256 values fall back to Q5_0"
    assert in_gguf.rms_norm_eps == pytest.approx(spec.rms_norm_eps)


def test_other_settings_are_named(student: Student, tmp_path: Path) -> None:
    write_gguf(student, "Q8_0", tmp_path / "x.gguf", name="x", threads=1)
    facts = gguf_facts(tmp_path / "x.gguf")
    assert facts.bits_per_weight == 8.5
    other = altered(student.spec, rope=replace(student.spec.rope, theta=5e5), rms_norm_eps=1e-4, top_k=1)
    rope, epsilon, top_k = setting_symptoms(facts, other)
    assert rope.endswith("10,000 in the file, 500,000 in config.json")
    assert epsilon.startswith("epsilon of the norms: 1e-0")
    assert top_k.endswith(f"{student.spec.top_k} in the file, 1 in config.json")


def test_metadata_is_what_gguf_py_reads(student: Student, tmp_path: Path) -> None:
    write_gguf(student, "Q8_0", tmp_path / "x.gguf", name="x", threads=1)
    file, reader = GgufFile(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    n_checked = 0
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        if field.types[0] is gguf.GGUFValueType.ARRAY:
            assert file.array_lengths[key] == len(field.data)
        else:
            assert file.metadata[key] == field.contents()
        n_checked += 1
    assert n_checked == len(file.metadata) + len(file.array_lengths) > 20


def test_files_are_found_wherever_they_lie(student: Student, tmp_path: Path) -> None:
    write_gguf(student, "Q8_0", tmp_path / "x.bin", name="x", threads=1)
    write_onnx(student, "F32", tmp_path / "repository" / "onnx", threads=1)
    by_magic = find_model_file(tmp_path / "x.bin")
    assert by_magic is not None
    assert (by_magic.format, by_magic.path) == ("gguf", tmp_path / "x.bin")
    graph = tmp_path / "repository" / "onnx" / "model.onnx"
    for path in (graph, graph.parent, graph.parent.parent):
        found = find_model_file(path)
        assert found is not None
        assert (found.format, found.path) == ("onnx", graph)
    assert find_model_file(tmp_path / "nothing") is None
    assert find_model_file(student.source.path) is None
    with pytest.raises(InputError, match=r"no readable ONNX graph"):
        onnx_facts(tmp_path / "x.bin")
