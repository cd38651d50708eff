"""Opens the original model, whatever it is stored as; the one place that knows the kinds of sources there are."""

from __future__ import annotations

from pathlib import Path

from compressors.model.sources.gguf_source import GgufSource
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.source import Source

__all__ = ["open_source"]


def open_source(path: Path) -> Source:
    """Opens a model: the folder of a Hugging Face checkpoint, such as a student that was saved, or a GGUF file.

    Of a model that was split into several GGUF files, the first is given. No weight is read.

    Raises:
        InputError: the path holds no model that can be read.
        UnsupportedError: it holds one of a kind that is not read.
    """
    return GgufSource(path) if path.suffix == ".gguf" and not path.is_dir() else Checkpoint(path)
