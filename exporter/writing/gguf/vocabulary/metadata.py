"""The tokenizer of a checkpoint as GGUF metadata, so that llama.cpp splits text into the same tokens.

The source is the tokenizer that transformers makes from the files, with tokens that only ``tokenizer_config.json``
names. BPE over bytes (Qwen, GPT, DeepSeek) needs the name that llama.cpp gives to the splitting expression; BPE over
letters (Mixtral, ERNIE, Gemma) needs scores or merges, and a unigram model its probabilities.
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
from compressors.model.files.tokenizer_files import files_state, open_tokenizer
from compressors.model.sources.gguf_folder import VOCABULARY
from exporter.writing.gguf.container import Value, int32_array, string, string_array
from exporter.writing.gguf.vocabulary.pre_tokenizers import is_byte_level, known_pre_tokenizer, steps_of
from exporter.writing.gguf.vocabulary.sentencepiece import SPACE_STEPS, sentencepiece_values
from exporter.writing.gguf.vocabulary.special_values import special_token_values
from exporter.writing.gguf.vocabulary.unigram import unigram_values

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
    loaded = open_tokenizer(folder)
    tokenizer = json.loads(loaded.backend_tokenizer.to_str())
    tokens, types = _tokens(tokenizer, vocab_size, path)
    if len(_vocabulary(tokenizer)) < loaded.backend_tokenizer.get_vocab_size(with_added_tokens=False):
        raise InputError(f"{path}: two tokens of its vocabulary have the same number; download it again")
    values = _values_by_kind(tokenizer, tokens, types, loaded.bos_token, path)
    special = special_token_values(folder, vocab_size, tokens, types)
    always = {key: value for key, value in values.items() if key in special}  # as this kind of tokenizer has it
    return {**values, **special, **always, **_chat_template_values(loaded.chat_template, folder)}


def _values_by_kind(
    tokenizer: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], begin: str | None, path: Path
) -> dict[str, Value]:
    """The keys of the tokens themselves, for the kind of tokenizer that it is."""
    model = tokenizer["model"]
    if model["type"] == "Unigram":
        return unigram_values(tokenizer, tokens, types, path)
    if model["type"] != "BPE":
        raise UnsupportedError(
            f"{path}: llama.cpp knows BPE and unigram tokenizers in this architecture, and none of type "
            f"{model['type']}; use --formats onnx"
        )
    _refuse_unknown_normalizer(tokenizer, path)
    if is_byte_level(tokenizer):
        return _byte_level_values(tokenizer, tokens, types, path)
    if model.get("byte_fallback"):
        return sentencepiece_values(tokenizer, tokens, types, begin, path)
    kinds = [step["type"] for step in steps_of(tokenizer.get("pre_tokenizer"))] or ["none"]
    raise UnsupportedError(
        f"{path}: llama.cpp knows BPE over bytes (a ByteLevel pre-tokenizer) and BPE with byte fallback; this "
        f"tokenizer is neither (pre-tokenizer {', '.join(kinds)}): use --formats onnx"
    )


def _refuse_unknown_normalizer(tokenizer: Mapping[str, Any], path: Path) -> None:
    """Checks every step of the normalizer of BPE.

    llama.cpp leaves text as it is. Most text is in Unicode's normal form C, and its SentencePiece tokenizers write
    spaces as ``▁``.
    """
    spaces = [] if is_byte_level(tokenizer) else SPACE_STEPS
    for step in steps_of(tokenizer.get("normalizer")):
        if step["type"] != "NFC" and dict(step) not in spaces:
            shown = {key: value for key, value in step.items() if key != "type"}
            settings = f" {shown}"[:120] if shown else ""
            raise UnsupportedError(
                f"{path}: llama.cpp has no equivalent for the normalizer {step['type']}{settings}, which changes "
                "ordinary text; use --formats onnx"
            )


def _vocabulary(tokenizer: Mapping[str, Any]) -> Mapping[str, int]:
    """The tokens of the model by their texts; a unigram model lists them in the order of their numbers."""
    tokens = tokenizer["model"]["vocab"]
    if isinstance(tokens, list):
        return {text: number for number, (text, _) in enumerate(tokens)}
    vocabulary: dict[str, int] = tokens
    return vocabulary


def _tokens(tokenizer: Mapping[str, Any], vocab_size: int, path: Path) -> tuple[list[str], list[int]]:
    """Texts and types by token id; ids without a token are unused, as in llama.cpp's converter."""
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    known = {token_id: text for text, token_id in _vocabulary(tokenizer).items()}
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
    normal, unused = int(TokenType.NORMAL), int(TokenType.UNUSED)
    types = [normal if token_id in known else unused for token_id in range(vocab_size)]
    for token_id, entry in added.items():
        types[token_id] = int(_added_token_type(entry))
    return tokens, types


def _padding_text(token_id: int, texts: set[str]) -> str:
    """The text that llama.cpp's converter writes for an id without a token, or another if a token has that text."""
    text = f"[PAD{token_id}]"
    while text in texts:
        text = f"[{text}]"
    return text


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
        Keys.Tokenizer.PRE: string(known_pre_tokenizer(tokenizer, path).name),
        Keys.Tokenizer.LIST: string_array(tokens),
        Keys.Tokenizer.TOKEN_TYPE: int32_array(types),
        Keys.Tokenizer.MERGES: string_array([f"{left} {right}" for left, right in tokenizer["model"]["merges"]]),
    }


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
