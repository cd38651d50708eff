"""The names of the files that stages leave and that OUT holds stand in one module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter import file_names
from exporter.file_names import GGUF_FILE, OVERLAY, RATE_RESULT, StageFile

_EXPORTER = Path(file_names.__file__).parent
_OTHERS = sorted(path for path in _EXPORTER.rglob("*.py") if path != Path(file_names.__file__))
_OF_THE_ORIGINAL = {("hub.py", "README.md"), ("writing/gguf/metadata.py", "README.md")}
"""The model card of the original has the name that ours has."""


def _file_names() -> set[str]:
    """The names that are a file's and can be no word of another meaning, such as the name of a stage."""
    values = [value for name, value in vars(file_names).items() if name.isupper()]
    texts = [value.name if isinstance(value, StageFile) else value for value in values]
    return {text for text in texts if isinstance(text, str) and "." in text[1:]} | {"SHA256SUMS"}


def _strings(path: Path) -> Iterator[str]:
    """The texts in a module's code, without docstrings and messages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("path", _OTHERS, ids=lambda path: str(path.relative_to(_EXPORTER)))
def test_no_other_module_spells_one(path: Path) -> None:
    names, where = _file_names(), str(path.relative_to(_EXPORTER))
    spelled = {(where, name) for text in _strings(path) for name in names if name == text.rpartition("/")[2]}
    assert spelled <= _OF_THE_ORIGINAL


def test_the_search_for_them_finds_them() -> None:
    assert {"blocks.safetensors", "report.json", "stage.json", "pareto.md"} <= _file_names()
    assert "evaluation.safetensors" in set(_strings(Path(file_names.__file__)))


def test_a_name_with_a_part_that_differs(tmp_path: Path) -> None:
    assert OVERLAY.within(tmp_path, layer=7) == tmp_path / "overlay-007.safetensors"
    assert RATE_RESULT.within(tmp_path, number=0, rate=0.001) == tmp_path / "trial-0-0.001.json"
    for name in ("overlay-002.safetensors", "overlay-001.safetensors", "overlay-001.json", "b.gguf"):
        (tmp_path / name).touch()
    assert [path.name for path in OVERLAY.all_within(tmp_path)] == [
        "overlay-001.safetensors",
        "overlay-002.safetensors",
    ]
    assert GGUF_FILE.all_within(tmp_path) == [tmp_path / "b.gguf"]
