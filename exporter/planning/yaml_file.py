"""Reads YAML that a person wrote, as plain data; every error is one sentence with line and column."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from compressors.model.errors import InputError
from compressors.model.files.raw_file import RawFile
from compressors.model.names import shown

__all__ = ["read_yaml"]

_LARGEST = 1_000_000  # bytes; a recipe has about 2,000


def read_yaml(path: Path, what: str) -> Any:
    """Reads a file of plain values, lists and mappings.

    Aliases are refused: a few lines of them stand for more values than a machine can hold.

    Args:
        path: the file.
        what: the expected content, for messages: ``a recipe``.

    Raises:
        InputError: the file cannot be opened, is too large, or is not UTF-8 or not such YAML.
    """
    file = RawFile(path)
    if file.size > _LARGEST:
        raise InputError(f"{path} cannot be read as {what}: it has {file.size:,} bytes, and none is so long")
    try:
        return yaml.load(file.start(_LARGEST).decode("utf-8"), _Loader)  # a SafeLoader
    except UnicodeDecodeError as error:
        why = f"byte {error.start:,} is no UTF-8"
    except RecursionError:
        why = "it is nested too deeply"
    except yaml.MarkedYAMLError as error:
        why = f"{error.problem or error.context}{_place(error.problem_mark)}"
    except yaml.YAMLError as error:
        why = str(error)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML turns texts into numbers and dates unchecked: 2001-99-99, !!int x, !!bool maybe
        why = f"a value is not of the type that it seems to have: {error}"
    raise InputError(f"{path} cannot be read as {what}: {why}")


class _Loader(yaml.SafeLoader):
    """Refuses aliases, and keys that occur twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not read; write the value out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key, _ in node.value if keys.count(key.value) > 1), None)
        if twice is not None:
            problem = f"{shown(twice.value)} is there twice; keep one"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=twice.start_mark)
        return super().construct_mapping(node, deep)


def _place(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
