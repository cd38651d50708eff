"""Reports as others may read them: they name files, and tell nothing of the folders on the machine of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.publishing.model_name import hub_id

__all__ = ["without_folders"]


def without_folders(report: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Returns a copy of a report in which local paths are names.

    A local model is ``./NAME``, so that nobody takes it for a repository of the hub; one in the hub's cache is its id.
    In all other places, such as the messages of a runtime, the folders that the job knows are left out.

    Args:
        report: the content of report.json, of one output or of several.
        out: the folder in which the report lies, or will lie.
    """
    told = {key: value for key, value in report.items() if key not in ("job", "command", "parts")}
    folders = {str(folder) for folder in _folders_of(report["job"], out)} - {"/"}
    shared: dict[str, Any] = _without(told, sorted(folders, key=len, reverse=True))
    job = {key: _named(value) for key, value in report["job"].items()}
    shared["job"] = job | {"model": _named_model(report["job"]["model"])}
    if "command" in report:
        shared["command"] = shlex.join(map(_named_word, shlex.split(report["command"])))
    if "parts" in report:
        shared["parts"] = {name: without_folders(part, out / name) for name, part in report["parts"].items()}
    return shared


def _folders_of(job: Mapping[str, Any], out: Path) -> Iterable[Path]:
    given = [text for value in job.values() for text in (value if isinstance(value, list) else [value])]
    paths = [Path(text) for text in given if isinstance(text, str)]
    return [Path.home(), out.resolve().parent, *(path.parent for path in paths if path.is_absolute())]


def _without(value: Any, folders: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(inside, folders) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_without(inside, folders) for inside in value]
    if isinstance(value, str):
        for folder in folders:
            value = value.replace(f"{folder}/", "")
    return value


def _named(value: Any) -> Any:
    if isinstance(value, list):
        return [_named(inside) for inside in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _named_model(model: str | None) -> str | None:
    if model is None or not Path(model).is_absolute():
        return model
    return hub_id(Path(model)) or f"./{Path(model).name}"


def _named_word(word: str) -> str:
    """A word of the command; a path that is no name below the current folder becomes its last part."""
    option, sign, value = word.partition("=") if word.startswith("-") else ("", "", word)
    is_elsewhere = value.startswith(("/", "~", "../"))
    return f"{option}{sign}{Path(value).name}" if is_elsewhere else word
