"""Checks a folder before the model in it is read: whether it is a checkpoint, and whether its files can be read.

Libraries read most of these files by themselves (configuration, tokenizer). Files that would make them fail, wait or
run out of memory are found here first.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from compressors.model.config.reading import is_inside_of_more
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.json_file import read_json
from compressors.model.files.raw_file import FileState, RawFile, instead_of_a_file
from compressors.model.names import shown

__all__ = ["JSON_FILES", "TEXT_FILES", "check_folder", "refuse_other_inputs"]

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
"""Files of a checkpoint that hold a JSON object, apart from the weights' index."""

TEXT_FILES = ("chat_template.jinja", "merges.txt", "tokenizer.model")
"""Other files that the result depends on."""

_ADAPTER = "adapter_config.json"
_LARGEST_TEXT = 64_000_000  # bytes


def check_folder(folder: Path) -> None:
    """Reads every small file that a run, or a library in it, would read.

    Raises:
        InputError: a file is damaged or not a regular file, or the folder holds an adapter.
    """
    if os.path.lexists(folder / _ADAPTER):
        raise InputError(
            f"{folder} holds a PEFT adapter ({_ADAPTER}), no whole model: merge it into its base model "
            f"(merge_and_unload, then save_pretrained) and give that folder; if it is merged already, remove {_ADAPTER}"
        )
    for name in (*JSON_FILES, *TEXT_FILES):
        path = folder / name
        if os.path.lexists(path):
            _check(path, _state(path))


def _state(path: Path) -> FileState | None:
    try:
        return FileState.of(path)
    except OSError:
        return None


@functools.lru_cache(maxsize=32)
def _check(path: Path, state: FileState | None) -> None:
    """Reads one file, and again only if it was changed, because a checkpoint is opened many times in a run."""
    if path.name in JSON_FILES:
        read_json(path)
        return
    file = RawFile(path)
    if file.size > _LARGEST_TEXT:
        raise InputError(f"{path} has {file.size:,} bytes, too many for such a file: download it again")
    text = file.start(_LARGEST_TEXT)
    if text and (other := instead_of_a_file(text[:200])) is not None:
        raise InputError(f"{path} cannot be used ({other}): download it again")
    try:
        if path.suffix != ".model":
            text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text (byte {error.start:,}): download it again") from None


def refuse_other_inputs(folder: Path) -> None:
    """Refuses a model whose ``config.json`` names other inputs than text, unless its language model can be read.

    Raises:
        InputError: the file cannot be read.
        UnsupportedError: the model has other inputs than text.
    """
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    if is_inside_of_more(config):
        return
    for key in ("text_config", "vision_config", "audio_config"):
        if isinstance(config.get(key), dict):
            raise UnsupportedError(
                f"{path}: {shown(config.get('model_type'))} takes more than text ({key}); only models of text alone "
                "are read: give the language model that it was made from"
            )
