"""The tokenizer of a checkpoint as GGUF metadata, so that llama.cpp splits text into the same tokens.

The source is the tokenizer that ``AutoTokenizer`` makes from the files, with tokens that only ``tokenizer_config.json``
names. Two kinds are known. Byte-level BPE (Qwen, Llama 3, GPT-2) needs the name that llama.cpp gives to the splitting
expression. SentencePiece-style BPE (Mixtral), which transformers holds as BPE with byte fallback, needs scores.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf.constants import Keys, TokenType

from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.files.gguf.pre_tokenizers import (
    is_byte_level,
    pre_tokenizer_name,
    refuse_unknown_normalizer,
    steps_of,
)
from compressors.model.files.tokenizer_files import files_state, load_tokenizer
from compressors.model.sources.gguf_folder import VOCABULARY
from exporter.writing.gguf.container import Value, boolean, float32_array, int32_array, string, string_array
from exporter.writing.gguf.special_values import special_token_values

__all__ = ["vocabulary_metadata"]

_CONTROL_MARKS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
"""Begin and end of tokens that llama.cpp's converter takes for control tokens even if the tokenizer does not say so
(``does_token_look_special`` in ``conversion/base.py``)."""


def vocabulary_metadata(folder: Path, vocab_size: int) -> dict[str, Value]:
    """The ``tokenizer.*`` keys for the tokenizer in ``folder``, padded to ``vocab_size`` tokens.

    Where the model is from a GGUF file they are that file's, byte for byte.

    The result is remembered for as long as the files do not change: planning asks for it again and again.

    Raises:
        InputError: the tokenizer is missing or damaged, or has more tokens than the model.
        UnsupportedError: llama.cpp has no equivalent of the tokenizer; the message names the part at fault.
    """
    return dict(_vocabulary_metadata(folder, vocab_size, files_state(folder)))


@functools.lru_cache(maxsize=2)
def _vocabulary_metadata(folder: Path, vocab_size: int, state: object) -> Mapping[str, Value]:
    if (folder / VOCABULARY).is_file():
        return {key: Value(value) for key, value in GgufFile(folder / VOCABULARY).stored_values("").items()}
    path = folder / "tokenizer.json"
    loaded = load_tokenizer(folder)
    tokenizer = json.loads(loaded.backend_tokenizer.to_str())
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise UnsupportedError(
            f"{path}: llama.cpp has no equivalent for a tokenizer of type {model['type']} in this architecture; "
            "use --formats onnx"
        )
    tokens, types = _tokens(tokenizer, vocab_size, path)
    if len(model["vocab"]) < loaded.backend_tokenizer.get_vocab_size(with_added_tokens=False):
        raise InputError(f"{path}: two tokens of its vocabulary have the same number; download it again")
    refuse_unknown_normalizer(tokenizer, path)
    if model.get("byte_fallback") and not is_byte_level(tokenizer):
        values = _sentencepiece_values(tokenizer, tokens, types)
    else:
        values = _byte_level_values(tokenizer, tokens, types, path)
    special = special_token_values(folder, vocab_size, tokens, types)
    return {**values, **special, **_chat_template_values(loaded.chat_template, folder)}


def _tokens(tokenizer: Mapping[str, Any], vocab_size: int, path: Path) -> tuple[list[str], list[int]]:
    """Texts and types by token id; ids without a token are unused, as in llama.cpp's converter."""
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    known = {token_id: text for text, token_id in tokenizer["model"]["vocab"].items()}
    known.update({token_id: entry["content"] for token_id, entry in added.items()})
    beyond = next((token_id for token_id in known if token_id >= vocab_size), None)
    if beyond is not None:
        raise InputError(
            f"{path.parent}: token {known[beyond]!r} has number {beyond}, but config.json says vocab_size "
            f"{vocab_size}; tokenizer and model do not belong together"
        )
    texts = set(known.values())
    tokens = [
        known[token_id] if token_id in known else _padding_text(token_id, texts) for token_id in range(vocab_size)
    ]
    types = [_token_type(token_id, known, added) for token_id in range(vocab_size)]
    return tokens, types


def _padding_text(token_id: int, texts: set[str]) -> str:
    """The text that llama.cpp's converter writes for an id without a token, or another if a token has that text."""
    text = f"[PAD{token_id}]"
    while text in texts:
        text = f"[{text}]"
    return text


def _token_type(token_id: int, known: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if token_id not in known:
        return int(TokenType.UNUSED)
    return int(_added_token_type(added[token_id]) if token_id in added else TokenType.NORMAL)


def _added_token_type(entry: Mapping[str, Any]) -> TokenType:
    text = entry["content"]
    if entry["special"] or any(text.startswith(begin) and text.endswith(end) for begin, end in _CONTROL_MARKS):
        return TokenType.CONTROL
    return TokenType.USER_DEFINED


def _byte_level_values(
    tokenizer: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], path: Path
) -> dict[str, Value]:
    return {
        Keys.Tokenizer.MODEL: string("gpt2"),
        Keys.Tokenizer.PRE: string(pre_tokenizer_name(tokenizer, path)),
        Keys.Tokenizer.LIST: string_array(tokens),
        Keys.Tokenizer.TOKEN_TYPE: int32_array(types),
        Keys.Tokenizer.MERGES: string_array([f"{left} {right}" for left, right in tokenizer["model"]["merges"]]),
    }


def _sentencepiece_values(
    tokenizer: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Value]:
    """Scores for llama.cpp's SentencePiece tokenizer, which merges the pair whose union has the highest score.

    BPE merges the pair that comes first in the list of merges: minus the place in that list is an equivalent score.
    """
    ranks: dict[str, int] = {}
    merges = tokenizer["model"]["merges"]
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    types = [_piece_type(token, token_type, tokenizer) for token, token_type in zip(tokens, types, strict=True)]
    return {
        Keys.Tokenizer.MODEL: string("llama"),
        Keys.Tokenizer.PRE: string("default"),
        Keys.Tokenizer.LIST: string_array(tokens),
        Keys.Tokenizer.SCORES: float32_array(scores),
        Keys.Tokenizer.TOKEN_TYPE: int32_array(types),
        Keys.Tokenizer.ADD_PREFIX: boolean(_prepends_space(tokenizer)),
    }


def _piece_type(token: str, token_type: int, tokenizer: Mapping[str, Any]) -> int:
    if token == tokenizer["model"].get("unk_token"):
        return TokenType.UNKNOWN
    is_byte = len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")
    return TokenType.BYTE if is_byte and token_type == TokenType.NORMAL else token_type


def _prepends_space(tokenizer: Mapping[str, Any]) -> bool:
    """True if a space is put before the text: by a normalizer in older files, by the pre-tokenizer in newer ones."""
    return any(step["type"] == "Prepend" for step in steps_of(tokenizer.get("normalizer"))) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in steps_of(tokenizer.get("pre_tokenizer"))
    )


def _chat_template_values(template: object, folder: Path) -> dict[str, Value]:
    """The keys of ``AutoTokenizer``'s chat template, or of several by name."""
    if isinstance(template, str):
        return {Keys.Tokenizer.CHAT_TEMPLATE: string(template)}
    if not isinstance(template, dict):
        return {}
    if not all(isinstance(text, str) for item in template.items() for text in item):
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a text, or texts by name; download it again"
        )
    named = dict(template)
    values = {Keys.Tokenizer.CHAT_TEMPLATE: string(named.pop("default"))} if "default" in named else {}
    if named:
        values[Keys.Tokenizer.CHAT_TEMPLATES] = string_array(sorted(named))
    for name, text in named.items():
        values[Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)] = string(text)
    return values
