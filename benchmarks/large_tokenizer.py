"""Gives a checkpoint a tokenizer with the size, the settings and the class of Qwen3's, whose own files are not here.

Its vocabulary is the bundled tokenizer's, and random merges of two tokens up to the published number. So it takes as
long to read, to check and to write as the published one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from exporter.hub import resolve_model

__all__ = ["write_large_tokenizer"]

_N_TOKENS = 151_643  # without added ones
_LONGEST = 24  # bytes of a token
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|mark_{number}|>" for number in range(11)))
_SHOWN = ("<tool_call>", "</tool_call>", *(f"<|file_{number}|>" for number in range(8)), "<think>", "</think>")
_FLAGS = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
_ENDS = {"bos_token_id": _N_TOKENS, "eos_token_id": _N_TOKENS + 2, "pad_token_id": None}


def write_large_tokenizer(folder: Path) -> None:
    """Replaces the tokenizer of a checkpoint, and the special tokens in its ``config.json``."""
    data = json.loads((resolve_model(None) / "tokenizer.json").read_text(encoding="utf-8"))
    texts = (*_SPECIAL, *_SHOWN)
    flags = [{"content": text, **_FLAGS, "special": text in _SPECIAL} for text in texts]
    data["added_tokens"] = [{"id": number, **entry} for number, entry in enumerate(flags, start=_N_TOKENS)]
    data["model"] |= _enlarged(data["model"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | _ENDS
    for name, content in (
        ("config.json", config),
        ("tokenizer.json", data),
        ("tokenizer_config.json", _settings(data["added_tokens"])),
        ("vocab.json", data["model"]["vocab"]),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    merges = (" ".join(pair) for pair in data["model"]["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _enlarged(model: dict[str, Any]) -> dict[str, Any]:
    """The vocabulary and merges of a ``tokenizer.json``, with more of both and without special tokens."""
    merges = [tuple(pair) for pair in model["merges"]]
    made = {left + right for left, right in merges}
    tokens = [*(text for text in model["vocab"] if len(text) == 1 and text not in made)]
    tokens += list(dict.fromkeys(left + right for left, right in merges))
    known, choose = set(tokens), random.Random(0).choice
    while len(tokens) < _N_TOKENS:
        left, right = choose(tokens), choose(tokens)
        if left + right not in known and len(left + right) <= _LONGEST:
            merges.append((left, right))
            tokens.append(left + right)
            known.add(left + right)
    return {"vocab": {text: number for number, text in enumerate(tokens)}, "merges": merges}


def _settings(added: list[dict[str, Any]]) -> dict[str, Any]:
    """A ``tokenizer_config.json`` with the keys of the published one."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in added
        },
        "additional_special_tokens": list(_SPECIAL[1:]),
        "bos_token": None,
        "chat_template": "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
