"""Finds the graph in a folder that somebody exported."""

from __future__ import annotations

import os
from pathlib import Path

from compressors.model.errors import InputError
from compressors.model.files.json_file import read_json
from compressors.model.names import shown

__all__ = ["find_onnx_model", "onnx_bytes", "onnx_model_file"]

_NAMES = ("model.onnx", "onnx/model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx")


def find_onnx_model(folder: Path) -> Path | None:
    """The graph that onnxruntime-genai's configuration names, or one under optimum's names; None if there is none."""
    named = _named_by_genai(folder / "genai_config.json")
    candidates = [folder / name for name in (*([named] if named else []), *_NAMES)]
    return next((path for path in candidates if os.path.isfile(path)), None)


def onnx_model_file(path: Path) -> Path:
    """The graph of a folder, or the file itself.

    Raises:
        InputError: there is no graph.
    """
    found = find_onnx_model(path) if path.is_dir() else path
    if found is None or not found.is_file():
        missing = path / _NAMES[0] if path.is_dir() else path
        raise InputError(f"{missing} is missing: give the folder that holds {_NAMES[0]}, or the file")
    return found


def onnx_bytes(path: Path) -> int:
    """Bytes of a graph and of the files beside it, which may hold its weights; 0 if there is nothing.

    Args:
        path: the graph, or its folder.
    """
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return 0
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _named_by_genai(config: Path) -> str | None:
    """The path that the configuration names, inside its folder; None if it names none."""
    try:
        name = read_json(config)["model"]["decoder"]["filename"]
    except (InputError, KeyError, TypeError):
        return None
    if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
        return None
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{config} names {shown(name)}, which lies outside of its folder: put the model there")
    return name


_LONGEST_NAME = 60  # characters of up to 4 bytes; a file system takes 255 bytes
