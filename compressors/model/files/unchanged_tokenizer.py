"""Says whether transformers' tokenizer for a checkpoint's files is ``tokenizer.json`` and nothing else.

transformers takes the file as it is where ``tokenizer_config.json`` names its general class. Most of its other classes
take the vocabulary, merges, added tokens and post-processor from the file, and make the steps before merging themselves
(``TokenizersBackend.convert_to_native_format``). For such a class that is known here the result is still the file's
tokenizer, provided that the file has the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.model.families.registry import supported_families
from compressors.model.files.gguf.pre_tokenizers import QWEN2_WORDS
from compressors.model.files.json_file import read_json

__all__ = ["MOST_TOKENS", "SPECIAL_KINDS", "has_other_files", "is_taken_as_it_is"]

MOST_TOKENS = 1 << 24
"""More than any vocabulary has. The library makes a table as long as the largest number, and aborts without room."""

SPECIAL_KINDS = ("bos_token", "eos_token", "pad_token", "unk_token")
"""The settings that name special tokens, as far as they are read without transformers."""

_GENERAL_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_STEPS_OF_CLASS: Mapping[str, Mapping[str, Any]] = {
    "Qwen2Tokenizer": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
    },
}
"""What a class makes itself, as ``tokenizer.json`` would have it, without the setting that changes no token."""

_OFFSETS = "trim_offsets"
_OPTIONS_OF_BPE = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
    *("fuse_unk", "byte_fallback", "ignore_merges"),
)
"""Options of ``tokenizer.json`` that such a class does not take from it."""

_MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")  # the earlier and the later name
_WITHOUT_EFFECT = (
    *("backend", "chat_template", "clean_up_tokenization_spaces", "errors", "is_local", "local_files_only"),
    *("model_max_length", "name_or_path", "tokenizer_class"),
)
_ONLY_IF_FALSE = ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens")
_UNDERSTOOD = frozenset({*SPECIAL_KINDS, *_MORE_SPECIAL, *_WITHOUT_EFFECT, *_ONLY_IF_FALSE, "added_tokens_decoder"})

_OTHER_FILES = ("tokenizer.model", "tekken.json")
_OF_TEMPLATES = ("chat_template.json", "chat_template.jinja", "additional_chat_templates")
_OF_ADDED_TOKENS = ("special_tokens_map.json", "added_tokens.json")  # read where the settings hold no added tokens

_AS_TRANSFORMERS_ADDS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}


def has_other_files(folder: Path, config: Mapping[str, Any]) -> bool:
    """True if a folder has further files that transformers reads, beside ``tokenizer.json`` and these settings."""
    further = () if "added_tokens_decoder" in config else _OF_ADDED_TOKENS
    return any((folder / name).exists() for name in (*_OTHER_FILES, *_OF_TEMPLATES, *further))


def is_taken_as_it_is(folder: Path, config: Mapping[str, Any], data: Mapping[str, Any]) -> bool:
    """True if transformers' object for a folder is its ``tokenizer.json`` and nothing else.

    Args:
        folder: the checkpoint's folder.
        config: its ``tokenizer_config.json``.
        data: its ``tokenizer.json``.
    """
    return (
        _is_usual(data)
        and _takes_the_file(config, data)
        and _leaves_the_class(folder)
        and {*config} <= _UNDERSTOOD
        and not any(config.get(key) for key in _ONLY_IF_FALSE)
        and isinstance(config.get("chat_template"), str | None)
        and _adds_nothing(config, data["added_tokens"])
    )


def _is_usual(data: Mapping[str, Any]) -> bool:
    model, added = data.get("model"), data.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(added, list) or not isinstance(model.get("vocab"), dict):
        return False
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and all(type(number) is int and number < MOST_TOKENS for number in model["vocab"].values())
        and all(isinstance(entry, dict) for entry in added)
        and data.get("truncation") is data.get("padding") is None
        and data.get("post_processor") is not None
    )


def _takes_the_file(config: Mapping[str, Any], data: Mapping[str, Any]) -> bool:
    """True if the class is the general one, or makes itself no more than what stands in the file."""
    name = config.get("tokenizer_class")
    if name in _GENERAL_CLASSES:
        return True
    steps = _STEPS_OF_CLASS.get(name.removesuffix("Fast")) if isinstance(name, str) else None
    if steps is None:
        return False
    numbers = [entry.get("id") for entry in data["added_tokens"]]
    return (
        all(_without_offsets(data.get(part)) == made for part, made in steps.items())
        and not any(data["model"].get(option) for option in _OPTIONS_OF_BPE)
        and all(kind in config for kind in SPECIAL_KINDS)  # such a class has tokens of its own where one is missing
        and all(type(number) is int for number in numbers)
        and numbers == sorted(numbers)  # the order in which it adds them, which gives them their numbers
    )


def _without_offsets(part: Any) -> Any:
    """A part of ``tokenizer.json`` without the setting that changes no token."""
    if isinstance(part, dict):
        return {key: _without_offsets(value) for key, value in part.items() if key != _OFFSETS}
    return list(map(_without_offsets, part)) if isinstance(part, list) else part


def _leaves_the_class(folder: Path) -> bool:
    """True if transformers takes the class that the files name; for some families it takes another.

    It is a class that leaves the expressions alone, too: those that transformers corrects in large vocabularies are of
    families that are not supported (``TokenizersBackend._patch_mistral_regex``).
    """
    path = folder / "config.json"
    model_type = read_json(path).get("model_type") if path.is_file() else None
    family = supported_families().get(model_type) if isinstance(model_type, str) else None
    return family is not None and not family.has_own_tokenizer


def _adds_nothing(config: Mapping[str, Any], added: Sequence[Mapping[str, Any]]) -> bool:
    """True if all tokens that the settings name are in the file, with the properties that transformers gives them."""
    of_config = config.get("added_tokens_decoder")
    if of_config is not None and of_config != {
        str(entry.get("id")): {key: value for key, value in entry.items() if key != "id"} for entry in added
    }:
        return False
    more = [config[key] for key in _MORE_SPECIAL if config.get(key)]
    if len(more) > 1 or not all(isinstance(tokens, list) for tokens in more):
        return False
    special = [config[kind] for kind in SPECIAL_KINDS if config.get(kind) is not None]
    return all(_is_special(token, added) for token in [*special, *(token for tokens in more for token in tokens)])


def _is_special(token: Any, added: Sequence[Mapping[str, Any]]) -> bool:
    """True if the file has a special token with the properties that transformers would give it."""
    found = [entry for entry in added if entry.get("content") == token] if isinstance(token, str) else []
    return len(found) == 1 and all(found[0].get(key) is value for key, value in _AS_TRANSFORMERS_ADDS.items())
