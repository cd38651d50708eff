"""The name of a model: its hub id, also if it lies in the hub's cache, or else its folder's or its file's name."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["hub_id", "is_local", "local_path", "model_name", "whole_path"]

_OF_A_FILE = re.compile(
    r"(?P<name>.+?)"
    r"(-[0-9]+x[0-9.]+[KMBTQ])?"  # sizes of experts, as ggml's convention of names has them
    r"([-._](Q[0-9]\w*|IQ[0-9]\w*|TQ[0-9]\w*|BF16|F16|F32|MXFP4\w*))?"
    r"(-[0-9]{5}-of-[0-9]{5})?\.gguf",
    re.ASCII | re.IGNORECASE,
)


def hub_id(folder: Path) -> str | None:
    """Turns ``models--organization--model/snapshots/revision``, in the hub's cache, into ``organization/model``."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def model_name(model: str) -> str:
    """Returns the hub id, or the folder's name for any spelling of its path (``.``, ``..``, a slash at the end).

    A GGUF file has the name that it begins with, without sizes of experts, type and number of a part.
    """
    if (match := _OF_A_FILE.fullmatch(Path(model).name)) is not None and not Path(model).expanduser().is_dir():
        return match["name"]
    if not is_local(model):
        return model
    folder = Path(local_path(model))
    return hub_id(folder) or folder.name or "model"


def local_path(model: str) -> str:
    """The absolute path of a local model, so that it means the same from every folder; a hub id as it stands."""
    return str(whole_path(Path(model).expanduser())) if is_local(model) else model


def whole_path(model: Path) -> Path:
    """The absolute path of a folder or of a GGUF file, which keeps its name where it is a link, as in the hub's cache.

    The other parts of a model that was split are found by that name.
    """
    return model.resolve() if model.is_dir() else model.parent.resolve() / model.name


def is_local(model: str) -> bool:
    """True if the model is a local folder or GGUF file; a hub id is neither."""
    path = Path(model).expanduser()
    return bool(model) and (path.is_dir() or (path.suffix == ".gguf" and path.exists()))
