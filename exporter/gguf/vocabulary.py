"""The tokenizer of a checkpoint as GGUF metadata, so that llama.cpp splits text into the same tokens.

Two kinds are known. Byte-level BPE (Qwen, Llama 3, GPT-2) needs the name that llama.cpp gives to the splitting
expression. SentencePiece-style BPE (Mixtral), which ``tokenizer.json`` holds as BPE with byte fallback, needs scores.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf.constants import Keys, TokenType
from gguf.vocab import SpecialVocab

from compressors.model.errors import InputError, UnsupportedError
from exporter.gguf.container import Value, boolean, float32_array, int32_array, string, string_array, uint32
from exporter.gguf.pre_tokenizers import pre_tokenizer_name

__all__ = ["vocabulary_metadata"]

_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja", "chat_template.json")

_SPECIAL_TOKEN_KEYS: Mapping[str, str] = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "eom": Keys.Tokenizer.EOM_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
}

_CONTROL_MARKS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
"""Begin and end of tokens that llama.cpp's converter takes for control tokens even when the tokenizer does not say so
(``does_token_look_special`` in ``conversion/base.py``)."""


def vocabulary_metadata(folder: Path, vocab_size: int) -> dict[str, Value]:
    """The ``tokenizer.*`` keys for the tokenizer in ``folder``, padded to ``vocab_size`` tokens.

    The result is remembered for as long as the files do not change: planning asks for it again and again.

    Raises:
        InputError: tokenizer.json is missing or damaged, or has more tokens than the model.
        UnsupportedError: llama.cpp has no equivalent of the tokenizer; the message names the part at fault.
    """
    present = [path for path in (folder / name for name in _FILES) if path.is_file()]
    state = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in present)
    return dict(_vocabulary_metadata(folder, vocab_size, state))


@functools.lru_cache(maxsize=2)
def _vocabulary_metadata(folder: Path, vocab_size: int, state: object) -> Mapping[str, Value]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        special = SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
        model = tokenizer["model"]
        if model["type"] != "BPE":
            raise UnsupportedError(f"{path}: llama.cpp has no equivalent for a tokenizer of type {model['type']}")
        tokens, types = _tokens(tokenizer, vocab_size, path)
        if model.get("byte_fallback"):
            values = _sentencepiece_values(tokenizer, tokens, types)
        else:
            values = _byte_level_values(tokenizer, tokens, types, special.merges, path)
        return {**values, **_special_token_values(special), **_chat_template_values(special.chat_template)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} or tokenizer_config.json is damaged ({error!r}): download them again") from None


def _tokens(tokenizer: Mapping[str, Any], vocab_size: int, path: Path) -> tuple[list[str], list[int]]:
    """Texts and types by token id; ids without a token are unused, as in llama.cpp's converter."""
    tokens = [f"[PAD{token_id}]" for token_id in range(vocab_size)]
    types: list[int] = [TokenType.UNUSED] * vocab_size
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    known = {token_id: text for text, token_id in tokenizer["model"]["vocab"].items()}
    known.update({token_id: entry["content"] for token_id, entry in added.items()})
    for token_id, text in known.items():
        if token_id >= vocab_size:
            raise InputError(
                f"{path}: token {text!r} has number {token_id}, but config.json says vocab_size {vocab_size}; "
                "tokenizer and model do not belong together"
            )
        tokens[token_id] = text
        types[token_id] = _added_token_type(added[token_id]) if token_id in added else TokenType.NORMAL
    return tokens, types


def _added_token_type(entry: Mapping[str, Any]) -> TokenType:
    text = entry["content"]
    if entry["special"] or any(text.startswith(begin) and text.endswith(end) for begin, end in _CONTROL_MARKS):
        return TokenType.CONTROL
    return TokenType.USER_DEFINED


def _byte_level_values(
    tokenizer: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], path: Path
) -> dict[str, Value]:
    return {
        Keys.Tokenizer.MODEL: string("gpt2"),
        Keys.Tokenizer.PRE: string(pre_tokenizer_name(tokenizer, path)),
        Keys.Tokenizer.LIST: string_array(tokens),
        Keys.Tokenizer.TOKEN_TYPE: int32_array(types),
        Keys.Tokenizer.MERGES: string_array(merges),
    }


def _sentencepiece_values(
    tokenizer: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Value]:
    """llama.cpp's SentencePiece tokenizer merges the pair whose union has the highest score.

    BPE merges the pair that comes first in the list of merges: minus the place in that list is an equivalent score.
    """
    ranks: dict[str, int] = {}
    merges = tokenizer["model"]["merges"]
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
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
    """Whether a space is put before the text: by a normalizer in older files, by the pre-tokenizer in newer ones."""
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    return any(step.get("type") == "Prepend" for step in steps) or (
        pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme", "always") != "never"
    )


def _special_token_values(special: SpecialVocab) -> dict[str, Value]:
    values = {
        _SPECIAL_TOKEN_KEYS[kind]: uint32(token_id)
        for kind, token_id in special.special_token_ids.items()
        if kind in _SPECIAL_TOKEN_KEYS
    }
    # always said: without these keys llama.cpp takes a default that depends on the kind of tokenizer
    values[Keys.Tokenizer.ADD_BOS] = boolean(special.add_special_token.get("bos", False))
    values[Keys.Tokenizer.ADD_EOS] = boolean(special.add_special_token.get("eos", False))
    return values


def _chat_template_values(template: str | Sequence[Mapping[str, str]] | None) -> dict[str, Value]:
    if template is None:
        return {}
    if isinstance(template, str):
        return {Keys.Tokenizer.CHAT_TEMPLATE: string(template)}
    named = {entry["name"]: entry["template"] for entry in template}
    values = {Keys.Tokenizer.CHAT_TEMPLATE: string(named.pop("default"))} if "default" in named else {}
    if named:
        values[Keys.Tokenizer.CHAT_TEMPLATES] = string_array(sorted(named))
    for name, text in named.items():
        values[Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)] = string(text)
    return values
