"""Copies a checkpoint's tokenizer beside the written weights, so that every client cuts text as the original does."""

from __future__ import annotations

import shutil
from pathlib import Path

from compressors.model.files.tokenizer_files import TOKENIZER_FILES, load_tokenizer, read_tokenizer_json
from exporter.writing.files import write_atomically

__all__ = ["copy_tokenizer", "write_tokenizer"]

_TEMPLATES = "additional_chat_templates"


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files as they are: transformers makes the same tokenizer from them."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES, dirs_exist_ok=True)


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
