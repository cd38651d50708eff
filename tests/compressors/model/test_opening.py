"""What a path holds decides what is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compressors.model.errors import InputError
from compressors.model.sources.gguf_source import GgufSource
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint


@pytest.fixture
def toy(toy_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return toy_checkpoint(tmp_path, n_layers=1)


def test_a_folder_is_a_checkpoint(toy: Path) -> None:
    source = open_source(toy)
    assert isinstance(source, Checkpoint)
    assert source.path == source.tokenizer_folder == toy
    assert source.config["num_hidden_layers"] == 1


def test_a_saved_student_is_a_checkpoint_like_any_other(toy: Path, tmp_path: Path) -> None:
    student = Student(open_source(toy), ExpertMap.keeping(32, [range(6)]))
    write_checkpoint(student, tmp_path / "student")
    assert open_source(tmp_path / "student").spec == student.spec


def test_a_gguf_file_is_a_source(toy: Path, tmp_path: Path) -> None:
    write_gguf(Student.teacher(open_source(toy)), "Q8_0", tmp_path / "model.gguf", name="toy", threads=1)
    source = open_source(tmp_path / "model.gguf")
    assert isinstance(source, GgufSource)
    assert source.spec == open_source(toy).spec


def test_an_empty_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match=r"model\.gguf is truncated or not a GGUF file"):
        open_source(tmp_path / "model.gguf")


def test_a_folder_with_a_gguf_file_says_to_give_the_file(toy: Path) -> None:
    (toy / "model.safetensors").rename(toy / "model-Q8_0.gguf")
    with pytest.raises(InputError, match=r"holds a GGUF file \(model-Q8_0\.gguf\): give that file itself"):
        open_source(toy)


def test_only_files_are_gguf_files(toy: Path, tmp_path: Path) -> None:
    folder = toy.rename(tmp_path / "model.gguf")
    assert open_source(folder).spec.n_experts == 32


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        open_source(tmp_path)
