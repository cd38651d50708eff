"""Copies a checkpoint's tokenizer beside the written weights, so that every client cuts text as the original does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors.model.files.json_file import read_json
from compressors.model.files.tokenizer_files import copy_tokenizer_files, load_tokenizer, read_tokenizer_json
from exporter.writing.files import write_atomically

__all__ = ["copy_tokenizer", "write_tokenizer"]

_CONFIG = "tokenizer_config.json"
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Classes of transformers 5 by the name that 4 knows too; in 5 both names are one class."""


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files: transformers makes the same tokenizer from them.

    Files that transformers 5 saved name things that 4.57, with which optimum works, does not know. They get the names
    that both read.

    Raises:
        InputError: the vocabulary cannot be read.
    """
    copy_tokenizer_files(source, folder)
    path = folder / _CONFIG
    if path.is_file():
        config = read_json(path)
        known = _as_both_read(config)
        if known != config:
            write_atomically(path, json.dumps(known, indent=2, ensure_ascii=False) + "\n")


def _as_both_read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the spelling of transformers 4, which 5 reads alike (``tokenization_utils_base.py``)."""
    known = dict(config)
    name = known.get("tokenizer_class")
    if isinstance(name, str):
        known["tokenizer_class"] = _CLASSES.get(name, name)
    if isinstance(known.get("extra_special_tokens"), list) and "additional_special_tokens" not in known:
        known["additional_special_tokens"] = known.pop("extra_special_tokens")
    return known


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
