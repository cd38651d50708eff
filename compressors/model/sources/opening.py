"""Opens the original model, whatever it is stored as; the one place that knows the kinds of sources there are."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from compressors.model.errors import UnsupportedError
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.source import Source

__all__ = ["open_source"]

_REMEMBERED = 2  # the original, and what it is compared with


def open_source(path: Path, *, keeps_mtp: bool = False) -> Source:
    """Opens a model: the folder of a Hugging Face checkpoint, such as a student that was saved, or a GGUF file.

    Of a model that was split into several GGUF files, the first is given. No weight is read, except those that may be
    copies of others. A checkpoint is remembered while the files of its folder stay as they are: 20,000 headers take a
    second, and a plan asks for them many times.

    Args:
        path: the folder or the file.
        keeps_mtp: the layer that predicts one more token is a part of the model; else it is read past.

    Raises:
        InputError: the path holds no model that can be read.
        UnsupportedError: it holds one of a kind that is not read, or no layer for MTP that can be kept.
    """
    if path.suffix != ".gguf" or path.is_dir():
        return _checkpoint(path, _state(path), keeps_mtp)
    if keeps_mtp:
        raise UnsupportedError(
            f"{path}: GGUF files are read without a layer for MTP: give the checkpoint, or leave --keep-mtp out"
        )
    from compressors.model.sources.gguf_source import GgufSource  # a tenth of a second, which checkpoints do not need

    return GgufSource(path)


@functools.lru_cache(maxsize=_REMEMBERED)
def _checkpoint(folder: Path, state: object, keeps_mtp: bool) -> Checkpoint:
    return Checkpoint(folder, keeps_mtp=keeps_mtp)


def _state(folder: Path) -> object:
    """Name, size, time and number of each file; without a folder that can be listed, opening says what is wrong."""
    try:
        found = [(entry.name, entry.stat()) for entry in os.scandir(folder.resolve())]
    except OSError:
        return None
    return tuple(
        sorted((name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino) for name, status in found)
    )
