"""Opens the original model, whatever it is stored as; the one place that knows the kinds of sources there are."""

from __future__ import annotations

from pathlib import Path

from compressors.model.errors import InputError
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.source import Source

__all__ = ["open_source"]


def open_source(path: Path) -> Source:
    """Opens a model: the folder of a Hugging Face checkpoint, such as a student that was saved. No weight is read.

    Raises:
        InputError: the path holds no model that can be read.
        UnsupportedError: it holds one of a kind that is not read.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        raise InputError(
            f"{path} is a file; GGUF files are compressed already: give the folder of the original checkpoint "
            "(`moe-export validate FILE` checks GGUF files)"
        )
    return Checkpoint(path)
