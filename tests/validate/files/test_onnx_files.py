"""Finds the graph among the files of an exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressors.model.errors import InputError
from validate.files.onnx_files import find_onnx_model


def _name(folder: Path, name: object) -> None:
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": name}}}))


def test_the_file_that_genai_names_comes_first(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("model.onnx", "sub/mine.onnx"):
        (tmp_path / name).touch()
    _name(tmp_path, "sub/mine.onnx")
    assert find_onnx_model(tmp_path) == tmp_path / "sub" / "mine.onnx"


@pytest.mark.parametrize("name", [None, 3, ["model.onnx"], "missing.onnx", "\0", "x" * 5000, ""])
def test_a_name_that_leads_nowhere_is_passed_over(tmp_path: Path, name: object) -> None:
    (tmp_path / "model.onnx").touch()
    _name(tmp_path, name)
    assert find_onnx_model(tmp_path) == tmp_path / "model.onnx"


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/outside.onnx", "sub/../../outside.onnx"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    _name(tmp_path, name)
    with pytest.raises(InputError, match=rf"genai_config\.json names {name}, which lies outside of its folder"):
        find_onnx_model(tmp_path)
