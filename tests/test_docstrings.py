"""What docstrings refer to exists."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_REPOSITORY = Path(__file__).parent.parent
_PACKAGES = ("compressors", "validate", "exporter")
_MODULES = [path for package in _PACKAGES for path in sorted((_REPOSITORY / package).rglob("*.py"))]
_REFERENCE = re.compile(rf":\w+:`~?([\w.]+)`|``((?:{'|'.join(_PACKAGES)})(?:\.\w+)+)``")


@dataclass(frozen=True)
class _Docstring:
    """A docstring, and the classes that contain it, the innermost last."""

    text: str
    classes: tuple[str, ...]


def _docstrings(node: ast.AST, classes: tuple[str, ...] = ()) -> Iterator[_Docstring]:
    """All docstrings below a node, those of constants and fields included."""
    for child in ast.iter_child_nodes(node):
        inside = (*classes, child.name) if isinstance(child, ast.ClassDef) else classes
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant) and isinstance(child.value.value, str):
            yield _Docstring(child.value.value, classes)
        yield from _docstrings(child, inside)


def _has(owner: Any, names: list[str]) -> bool:
    """True if a chain of attributes exists; the last may be a field without a value, or one set in ``__init__``."""
    for name in names[:-1]:
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    (last,) = names[-1:] or ("__doc__",)
    return hasattr(owner, last) or last in getattr(owner, "__annotations__", {})


def _exists(target: str, module: ModuleType, classes: tuple[str, ...]) -> bool:
    names = target.split(".")
    owners = [module, *(getattr(module, name) for name in classes if hasattr(module, name))]
    if any(_has(owner, names) for owner in owners):
        return True
    for length in range(len(names), 0, -1):
        try:
            found = importlib.import_module(".".join(names[:length]))
        except ModuleNotFoundError:
            continue
        return _has(found, names[length:])
    return False


def _name(path: Path) -> str:
    return ".".join(path.relative_to(_REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", _MODULES, ids=_name)
def test_everything_that_a_docstring_refers_to_exists(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    references = [
        (role or quoted, docstring.classes)
        for docstring in _docstrings(tree)
        for role, quoted in _REFERENCE.findall(docstring.text)
    ]
    if references:
        module = importlib.import_module(_name(path))
        assert [target for target, classes in references if not _exists(target, module, classes)] == []


def test_a_wrong_reference_is_found() -> None:
    module = importlib.import_module("compressors.model.sources.student")
    assert _exists("Student.teacher", module, ())
    assert _exists("to_json", module, ("ExpertMap",))
    assert _exists("compressors.model.description.spec.ModelSpec", module, ())
    assert not _exists("compressors.model.sources.checkpoint", module, ())
    assert not _exists("Student.nothing", module, ())
    assert not _exists("nothing", module, ("Student",))
