"""The name of a model: its hub id, also if it lies in the hub's cache, or else its folder's name."""

from __future__ import annotations

from pathlib import Path

__all__ = ["hub_id", "is_folder", "local_path", "model_name"]


def hub_id(folder: Path) -> str | None:
    """Turns ``models--organization--model/snapshots/revision``, in the hub's cache, into ``organization/model``."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def model_name(model: str) -> str:
    """Returns the hub id, or the folder's name for any spelling of its path (``.``, ``..``, a slash at the end)."""
    if not is_folder(model):
        return model
    folder = Path(local_path(model))
    return hub_id(folder) or folder.name or "model"


def local_path(model: str) -> str:
    """The absolute path of a local model, so that it means the same from every folder; a hub id as it stands."""
    return str(Path(model).expanduser().resolve()) if is_folder(model) else model


def is_folder(model: str) -> bool:
    """True if the model is a local folder; a hub id is not."""
    return bool(model) and Path(model).expanduser().is_dir()
