"""Copies a checkpoint's tokenizer beside the written weights, so that every client cuts text as the original does."""

from __future__ import annotations

from pathlib import Path

from compressors.model.files.tokenizer_files import copy_tokenizer_files, load_tokenizer, read_tokenizer_json
from exporter.writing.files import write_atomically

__all__ = ["copy_tokenizer", "write_tokenizer"]


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files: transformers makes the same tokenizer from them.

    Raises:
        InputError: the vocabulary cannot be read.
    """
    copy_tokenizer_files(source, folder)


def write_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files for clients that read ``tokenizer.json`` alone, as onnxruntime-genai does.

    It is written again if transformers adds to it (tokens that only ``tokenizer_config.json`` names) or makes it from
    other files.

    Raises:
        InputError: the tokenizer cannot be used.
    """
    copy_tokenizer(source, folder)
    path = folder / "tokenizer.json"
    loaded = load_tokenizer(source).backend_tokenizer.to_str()
    if not path.is_file() or read_tokenizer_json(path).to_str() != loaded:
        write_atomically(path, loaded)
