"""The tokens that begin, end and pad texts, as transformers reads them.

``generation_config.json`` stands over ``config.json`` (``GenerationConfig``), and each may name several end tokens. The
tokenizer's own end token ends a text too: vLLM and SGLang stop at both, and chat templates are made with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError
from compressors.model.files.json_file import read_json
from compressors.model.files.tokenizer_files import open_tokenizer

__all__ = ["ConfiguredTokens", "SpecialTokens", "configured_tokens", "special_tokens"]

_GENERATION_CONFIG = "generation_config.json"
_LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class ConfiguredTokens:
    """Token ids as the two configurations give them; all are rows of the model's vocabulary."""

    bos: int | None
    ends: tuple[int, ...]
    pad: int | None
    without_row: tuple[int, ...]  # end tokens that are named but have no row in the model: it never gives them


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids as clients need them, the tokenizer's own among them."""

    bos: int | None
    ends: tuple[int, ...]  # every one ends a text; the tokenizer's own comes last, unless a configuration names it too
    pad: int | None


def special_tokens(folder: Path, vocab_size: int) -> SpecialTokens:
    """Returns the special tokens of a checkpoint of ``vocab_size`` rows; loads its tokenizer.

    Raises:
        InputError: a configuration or the tokenizer is damaged, or the only end tokens are outside the vocabulary.
    """
    configured = configured_tokens(folder, vocab_size)
    tokenizer = open_tokenizer(folder)
    own: int | None = tokenizer.eos_token_id
    ends = configured.ends if own is None or own in configured.ends else (*configured.ends, own)
    if not ends and configured.without_row:
        raise InputError(
            f"{folder}: eos_token_id is {configured.without_row[0]}, but the model has {vocab_size} tokens; name its "
            f"end token in {_GENERATION_CONFIG} or config.json"
        )
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else configured.bos
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else configured.pad
    return SpecialTokens(bos, ends, pad)


def configured_tokens(folder: Path, vocab_size: int) -> ConfiguredTokens:
    """Returns the tokens of ``generation_config.json`` or, where it names none, of ``config.json``; both are small.

    Raises:
        InputError: an id is not a whole number from 0 on, or the begin or padding token is outside the vocabulary.
    """
    ends = _ids(folder, "eos_token_id")
    single = {}
    for key in ("bos_token_id", "pad_token_id"):
        ids = _ids(folder, key)
        if any(token >= vocab_size for _, token in ids):
            raise InputError(
                f"{ids[0][0]}: {key} is {ids[0][1]}, but vocab_size is {vocab_size}; correct it, or set it to null"
            )
        single[key] = ids[0][1] if ids else None
    return ConfiguredTokens(
        single["bos_token_id"],
        tuple(token for _, token in ends if token < vocab_size),
        single["pad_token_id"],
        tuple(token for _, token in ends if token >= vocab_size),
    )


def _ids(folder: Path, key: str) -> list[tuple[Path, int]]:
    """The ids under a key without repetition, each with the file that it is from."""
    for path, settings in _settings(folder):
        value = settings.get(key)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            return [(path, token) for token in dict.fromkeys(_checked(token, key, value, path) for token in values)]
    return []


def _settings(folder: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """The objects that may name tokens, the one that counts most first."""
    found: list[tuple[Path, Mapping[str, Any]]] = []
    for name in (_GENERATION_CONFIG, "config.json"):
        path = folder / name
        if path.is_file():
            data = read_json(path)
            found.append((path, data))
            inner = data.get("text_config")  # multimodal models have it
            if isinstance(inner, dict):
                found.append((path, inner))
    return found


def _checked(token: object, key: str, value: object, path: Path) -> int:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _LARGEST_ID:
        shown = repr(value)[:80]
        raise InputError(f"{path}: {key} must be a token id (a whole number from 0 on) or a list of them, not {shown}")
    return token
