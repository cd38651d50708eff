"""The tokenizer files that are made of a vocabulary which no ``tokenizer.json`` holds."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors.model.files.json_file import read_json
from compressors.model.files.vocabularies.sentencepiece import sentencepiece_tokenizer
from compressors.model.files.vocabularies.tiktoken import find_ranks, tiktoken_tokenizer

__all__ = ["MADE_OF", "is_vocabulary_file", "made_tokenizer_files", "named_code"]

MADE_OF = ("tiktoken.model", "*.tiktoken", "tokenization_*.py")
"""Patterns of further files that a tokenizer may depend on."""


def is_vocabulary_file(name: str) -> bool:
    """True for the name of a file from which a tokenizer may be made."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in MADE_OF)


def named_code(folder: Path) -> str | None:
    """Returns the class outside of transformers that ``tokenizer_config.json`` names, None if it names none."""
    path = folder / "tokenizer_config.json"
    names = read_json(path).get("auto_map") if path.is_file() else None
    named = names.get("AutoTokenizer") if isinstance(names, dict) else names
    chosen = [name for name in (named if isinstance(named, list) else [named]) if name]
    return str(chosen[0])[:80] if chosen else None


def made_tokenizer_files(folder: Path) -> Mapping[str, str] | None:
    """Returns the contents of ``tokenizer.json`` and ``tokenizer_config.json`` by name.

    None for folders that have a ``tokenizer.json``, and for those of whose files transformers makes a tokenizer.

    Raises:
        InputError: the files are damaged, or do not say how text is cut.
    """
    if (folder / "tokenizer.json").is_file():
        return None
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    code, ranks, model = named_code(folder), find_ranks(folder), folder / "tokenizer.model"
    if ranks is not None and code is not None:
        tokenizer = tiktoken_tokenizer(ranks, code, settings)
    elif ranks is None and model.is_file():
        tokenizer = sentencepiece_tokenizer(model, settings)
    else:
        return None
    return {"tokenizer.json": _written(tokenizer), "tokenizer_config.json": _written(_without_code(settings))}


def _without_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings for transformers' own class."""
    kept = {key: value for key, value in settings.items() if key not in ("auto_map", "vocab_file")}
    return {**kept, "tokenizer_class": "PreTrainedTokenizerFast"}


def _written(data: Mapping[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False)
