"""The small files that go with a GGUF file: settings, tokenizer and model card, made of its metadata.

All other code reads them where a checkpoint has them: in a folder. It lies among the temporary files, under a name that
follows from the file's header, so that all processes of a run share it; and it is made again wherever it is incomplete.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from gguf.constants import GGUF_MAGIC, GGUF_VERSION

from compressors.model.errors import InputError
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.files.gguf.gguf_tokenizer import generation_config, tokenizer_config, tokenizer_json

__all__ = ["VOCABULARY", "folder_of", "not_carried_over"]

VOCABULARY = "moe-export-vocabulary.gguf"
"""A GGUF file of the tokenizer's metadata alone: new files take them from it, byte for byte."""

_TOKENIZER = "tokenizer."
_CARD = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}
"""Entries of a model card that new files repeat, by the keys that they are from."""

_BASE_MODEL = "general.base_model"
_MADE_AGAIN = frozenset(
    f"general.{key}"
    for key in (
        *("alignment", "architecture", "basename", "file_type", "finetune", "name", "organization", "quantized_by"),
        *("quantization_version", "size_label", "type", "version"),
    )
)
"""Keys that new files have by other rules."""


def folder_of(file: GgufFile, config: Mapping[str, Any]) -> Path:
    """The folder with the small files, complete.

    Args:
        file: the file.
        config: the settings by transformers' names.

    Raises:
        InputError: the tokenizer is damaged, or the folder cannot be written.
        UnsupportedError: no tokenizer of transformers is known to be equal.
    """
    digest = file.header_digest()
    contents = _contents(file.path, digest, json.dumps(config))
    folder = _own_folder() / digest
    try:
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            _write(folder / name, content)
    except OSError as error:
        raise _cannot_be_written(folder, error) from None
    return folder


def _own_folder() -> Path:
    """This user's folder among the temporary files.

    Raises:
        InputError: it cannot be made, or is somebody else's.
    """
    folder = Path(tempfile.gettempdir()) / f"moe-export-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise _cannot_be_written(folder, error) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise InputError(f"{folder} is no folder of yours; name another place for temporary files in TMPDIR")
    return folder


def _cannot_be_written(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"{folder}: the tokenizer of a GGUF file cannot be put there ({error.strerror}); name another place for "
        "temporary files in TMPDIR"
    )


def _write(path: Path, content: bytes) -> None:
    """Writes a file unless it is there already; other processes never see a part of it."""
    if path.is_file() and path.read_bytes() == content:
        return
    own = path.with_name(f"{path.name}.{os.getpid()}")
    own.write_bytes(content)
    own.replace(path)


@lru_cache(maxsize=1)
def _contents(path: Path, digest: str, settings: str) -> Mapping[str, bytes]:
    """The files by name, remembered for as long as the header stays the same: planning asks for them often."""
    file, config = GgufFile(path), json.loads(settings)
    tokens, objects = generation_config(file), {"tokenizer.json": tokenizer_json(file)}
    objects |= {"config.json": {**config, **tokens}, "generation_config.json": tokens}
    objects["tokenizer_config.json"] = {**tokenizer_config(file), "model_max_length": config["max_position_embeddings"]}
    texts = {name: json.dumps(data, ensure_ascii=False, indent=1) for name, data in objects.items()}
    contents = {name: text.encode() for name, text in texts.items()}
    return {**contents, "README.md": _card(file), VOCABULARY: _vocabulary(file)}


def _card(file: GgufFile) -> bytes:
    """A model card with licence and ancestors alone; empty where the file names neither."""
    entries: dict[str, Any] = {
        entry: file.metadata[key] for entry, key in _CARD.items() if isinstance(file.metadata.get(key), str)
    }
    if ancestors := _ancestors(file.metadata):
        entries["base_model"] = ancestors
    return f"---\n{yaml.safe_dump(entries, allow_unicode=True)}---\n".encode() if entries else b""


def _ancestors(metadata: Mapping[str, Any]) -> list[str]:
    """The models that the file's was made of: their names on the hub where these are known."""
    count = metadata.get(f"{_BASE_MODEL}.count", 0)
    found = []
    for index in range(count if type(count) is int else 0):
        parts = (metadata.get(f"{_BASE_MODEL}.{index}.{part}") for part in ("organization", "name"))
        named = [part.replace(" ", "-") for part in parts if isinstance(part, str)]
        url = metadata.get(f"{_BASE_MODEL}.{index}.repo_url")
        if isinstance(url, str) and url.startswith("https://huggingface.co/"):
            named = ["/".join(url.split("/")[3:5])]
        found += ["/".join(named)] if named else []
    return found


def _vocabulary(file: GgufFile) -> bytes:
    values = file.stored_values(_TOKENIZER)
    parts = [struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, 0, len(values))]
    for key, value in values.items():
        parts += [struct.pack("<Q", len(key.encode())), key.encode(), value]
    return b"".join(parts)


def not_carried_over(file: GgufFile, architecture: str) -> list[str]:
    """The keys of metadata that new files do not have, whose meaning is for people alone."""
    known = (f"{architecture}.", _TOKENIZER, f"{_BASE_MODEL}.", "split.")
    keys = {*file.metadata, *file.array_lengths} - _MADE_AGAIN - set(_CARD.values())
    return sorted(key for key in keys if not key.startswith(known))
