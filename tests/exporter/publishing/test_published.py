"""A published folder that somebody edited: what is wrong is named, and a file that nobody vouches for has changed."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressors.model.errors import InputError
from exporter.publishing.published import changed_files, read_report

_Edit = Callable[[dict[str, Any]], object]


def _report() -> dict[str, Any]:
    layers = [{"source": layer, "groups": [[0], [2, 1]], "width": None} for layer in (0, 2)]
    return {
        "artifacts": [{"format": "gguf", "path": "x.gguf"}, {"format": "onnx", "path": "onnx"}],
        "job": {"model": None, "revision": None},
        "source": {"identity": "ab", "n_layers": 3},
        "recipe": {"text": {"heldout_chunks_per_file": 2}, "compress": {"edit": "none"}},
        "student": {"expert_map": {"teacher_experts": 4, "layers": layers}, "dense": False},
        "recovery": [{"accepted": True}, {"reason": "too large"}],
        "text": {"heldout": {"sha256": "cd"}},
        "validation": [{"artifact": "gguf", "perplexity": None, "routing": {"vs_teacher": {"overlap": 1}}}],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a run leaves it."""
    (tmp_path / "onnx").mkdir()
    names = ("x.gguf", "onnx/model.onnx", "recipe.yaml")
    for name in names:
        (tmp_path / name).write_text(name, encoding="utf-8")
    sums = "".join(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in names)
    (tmp_path / "SHA256SUMS").write_text(sums, encoding="utf-8")
    (tmp_path / "report.json").write_text(json.dumps(_report()), encoding="utf-8")
    return tmp_path


def test_an_unchanged_folder_is_read(folder: Path) -> None:
    report = read_report(folder)
    assert report == _report()
    assert changed_files(folder, report) == 0


def test_another_folder_has_no_report(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    assert read_report(tmp_path / "nothing") is None


def _set(*way: str | int, value: object) -> _Edit:
    def edit(report: dict[str, Any]) -> None:
        node: Any = report
        for key in way[:-1]:
            node = node[key]
        node[way[-1]] = value

    return edit


_LAYER = ("student", "expert_map", "layers", 1)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda report: report.pop("artifacts"), "artifacts: field required"),
        (_set("artifacts", value=[]), "artifacts: "),
        (_set("artifacts", 0, "path", value="../x.gguf"), "artifacts.0.path: value error, ../x.gguf is no place"),
        (_set("artifacts", 0, "path", value="/dev/zero"), "artifacts.0.path: "),
        (_set("artifacts", 0, "path", value="y" * 300), "is too long for a name"),
        (_set("source", "n_layers", value=10**9), "source.n_layers: "),
        (_set("source", "n_layers", value=2), "layers that the original does not have"),
        (_set("recipe", "text", "heldout_chunks_per_file", value=0), "heldout_chunks_per_file: "),
        (_set("student", value=[]), "student: "),
        (_set(*_LAYER, "source", value=0), "not in the original's order"),
        (_set(*_LAYER, "groups", value=[[0], [0]]), "layer 2 keeps experts twice"),
        (_set(*_LAYER, "groups", value=[[4]]), "layer 2 keeps experts twice, or such as the original does not have"),
        (_set(*_LAYER, "groups", value=[[]]), "groups.0: "),
        (_set("validation", value=_report()["validation"] * 2), "two rows of one artifact"),
        (_set("validation", 0, "perplexity", value="x\x1b"), "validation.0.perplexity: "),
    ],
)
def test_a_damaged_entry_of_the_report_is_named(folder: Path, edit: _Edit, said: str) -> None:
    report = copy.deepcopy(_report())
    edit(report)
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(InputError) as raised:
        read_report(folder)
    assert f"{folder / 'report.json'} is damaged (" in str(raised.value)
    assert said in str(raised.value)
    assert str(raised.value).endswith("; give the output folder of a finished run")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"artifacts": ' + "[" * 100_000])
def test_a_report_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"report\.json is damaged"):
        read_report(folder)


def test_changed_missing_and_unlisted_files_are_counted(folder: Path) -> None:
    report = _report()
    (folder / "x.gguf").write_text("other", encoding="utf-8")
    assert changed_files(folder, report) == 1
    (folder / "recipe.yaml").unlink()
    assert changed_files(folder, report) == 2
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text(lines[2], encoding="utf-8")
    assert changed_files(folder, report) == 3, "two artifacts that are not listed, and the recipe"


@pytest.mark.parametrize(
    ("sums", "said"),
    [
        (b"", "line 1 is no digest and name"),
        (b"x\n", "line 1 is no digest and name"),
        (b"\xff", "can't decode"),
        (b"0" * 64 + b"  ../x\n", "../x is no place below the folder"),
        (b"0" * 64 + b"  /dev/zero\n", "/dev/zero is no place below the folder"),
        (b"0" * 64 + b"  " + b"y" * 300 + b"\n", "is too long for a name"),
    ],
)
def test_damaged_sums_are_named(folder: Path, sums: bytes, said: str) -> None:
    (folder / "SHA256SUMS").write_bytes(sums)
    with pytest.raises(InputError, match=r"SHA256SUMS is damaged") as raised:
        changed_files(folder, _report())
    assert said in str(raised.value)


def test_a_folder_without_sums_is_refused(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match=r"has no SHA256SUMS"):
        changed_files(folder, _report())
