"""Opens the original model, whatever it is stored as; the one place that knows the kinds of sources there are."""

from __future__ import annotations

from pathlib import Path

from compressors.model.errors import UnsupportedError
from compressors.model.sources.gguf_source import GgufSource
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.source import Source

__all__ = ["open_source"]


def open_source(path: Path, *, keeps_mtp: bool = False) -> Source:
    """Opens a model: the folder of a Hugging Face checkpoint, such as a student that was saved, or a GGUF file.

    Of a model that was split into several GGUF files, the first is given. No weight is read, except those that may be
    copies of others.

    Args:
        path: the folder or the file.
        keeps_mtp: the layer that predicts one more token is a part of the model; else it is read past.

    Raises:
        InputError: the path holds no model that can be read.
        UnsupportedError: it holds one of a kind that is not read, or no layer for MTP that can be kept.
    """
    if path.suffix != ".gguf" or path.is_dir():
        return Checkpoint(path, keeps_mtp=keeps_mtp)
    if keeps_mtp:
        raise UnsupportedError(
            f"{path}: GGUF files are read without a layer for MTP: give the checkpoint, or leave --keep-mtp out"
        )
    return GgufSource(path)
