"""Licences and notices travel; nothing else that lies beside a model does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.publishing.license_files import license_files
from exporter.writing.gguf.writer import write_gguf


@pytest.fixture
def folder(toy_model: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(toy_model, tmp_path / "model")
    (copy / "LICENSE").unlink()
    return copy


def test_licences_of_every_spelling_are_found(folder: Path) -> None:
    names = ["LICENSE", "LICENCE.md", "license-code.txt", "NOTICE", "USE_POLICY.md", "COPYING"]
    for name in (*names, "licensed.bin", "README2", "unlicense.txt"):
        (folder / name).write_text(name)
    assert [path.name for path in license_files(open_source(folder))] == sorted(names)


def test_what_is_no_text_stays(folder: Path) -> None:
    (folder / "LICENSE").mkdir()
    (folder / "NOTICE").touch()
    os.truncate(folder / "NOTICE", 2 << 20)
    assert license_files(open_source(folder)) == []


def test_beside_a_gguf_file_lies_something_else(toy_model: Path, tmp_path: Path) -> None:
    write_gguf(Student.teacher(open_source(toy_model)), "Q8_0", tmp_path / "x.gguf", name="x", threads=1)
    (tmp_path / "LICENSE").write_text("of a browser")
    assert license_files(open_source(tmp_path / "x.gguf")) == []
