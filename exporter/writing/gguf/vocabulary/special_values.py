"""The special tokens as GGUF metadata: begin, end, padding, and whether texts get them.

llama.cpp knows three keys for tokens that end a text (eos, eot, eom), and takes further ones by their text alone
(``llama_vocab::impl::load`` in ``src/llama-vocab.cpp``). Where the key of eos is missing or wrong it takes a default:
token 11 of byte-level vocabularies, the comma in Qwen's, and token 2 of SentencePiece's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gguf.constants import Keys, TokenType

from compressors.model.config.special_tokens import special_tokens
from compressors.model.errors import UnsupportedError
from compressors.model.files.tokenizer_files import open_tokenizer
from exporter.writing.gguf.container import Value, boolean, uint32

__all__ = ["special_token_values", "tokens_around"]

_ENDS_BY_TEXT = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend▁of▁sentence\uff5c>", "[e~[",
})  # fmt: skip
"""Texts at which llama.cpp ends without a key; they leave the keys to others."""


def special_token_values(
    folder: Path, vocab_size: int, tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Value]:
    """The keys of special tokens.

    Args:
        folder: the checkpoint's folder.
        vocab_size: the rows of its embedding.
        tokens: texts by token id.
        types: ``gguf.TokenType`` by token id.

    Raises:
        InputError: a configuration names an invalid id.
        UnsupportedError: the model has no end token, and all of its tokens occur in texts.
    """
    tokenizer, special = open_tokenizer(folder), special_tokens(folder, vocab_size)
    before, behind = tokens_around(tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False))
    adds_bos, adds_eos = len(before) == 1, len(behind) == 1 and behind[0] in special.ends
    own = {
        "bos": before[0] if adds_bos else tokenizer.bos_token_id,
        "eos": behind[0] if adds_eos else tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "sep": tokenizer.sep_token_id,
        "pad": tokenizer.pad_token_id,
        "mask": tokenizer.mask_token_id,
    }
    configured = {"bos": special.bos, "eos": next(iter(special.ends), None), "pad": special.pad}
    ids = {kind: token for kind, token in own.items() if token is not None}
    ids |= {kind: token for kind, token in configured.items() if token is not None and kind not in ids}
    if "eos" not in ids:
        marks = [ids[kind] for kind in ("pad", "unk", "bos") if kind in ids]
        ids["eos"] = _never_in_a_text(folder, tokens, types, marks)
    ids |= _further_ends(special.ends, ids["eos"], tokens)
    keys = {kind: getattr(Keys.Tokenizer, f"{kind.upper()}_ID") for kind in ids}
    values = {keys[kind]: uint32(token) for kind, token in ids.items()}
    # always written: without these keys llama.cpp takes a default that depends on the kind of tokenizer
    values[Keys.Tokenizer.ADD_BOS] = boolean(adds_bos)
    values[Keys.Tokenizer.ADD_EOS] = boolean(adds_eos)
    return values


def tokens_around(whole: Sequence[int], text: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Splits the tokens of a text with those that were put before and behind it; empty where ``text`` is not inside."""
    for start in range(len(whole) - len(text) + 1):
        if list(whole[start : start + len(text)]) == list(text):
            return tuple(whole[:start]), tuple(whole[start + len(text) :])
    return (), ()


def _further_ends(ends: Sequence[int], eos: int, tokens: Sequence[str]) -> dict[str, int]:
    """Puts the other end tokens under further keys, first those that llama.cpp would not know by their text.

    It also ends texts at the padding and separator tokens of fill-in-the-middle, which hardly any model uses: their
    keys are the last resort.
    """
    unknown = [token for token in ends if token != eos and tokens[token] not in _ENDS_BY_TEXT]
    known = [token for token in ends if token != eos and tokens[token] in _ENDS_BY_TEXT]
    keys = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    placed = dict(zip(keys, unknown, strict=False))
    return placed | dict(zip((key for key in keys[:2] if key not in placed), known, strict=False))


def _never_in_a_text(folder: Path, tokens: Sequence[str], types: Sequence[int], marks: Sequence[int]) -> int:
    """Chooses a token as eos for a model that has none: a row that no token uses, else a token that is only a mark."""
    unused = [token for token, kind in enumerate(types) if kind == TokenType.UNUSED]
    if unused:
        return unused[-1]
    control = [token for token, kind in enumerate(types) if kind == TokenType.CONTROL]
    for token in (*marks, *reversed(control)):
        if token in control:
            return token
    default = [tokens[token] for token in (11, 2) if token < len(tokens)]
    raise UnsupportedError(
        f"{folder} names no token that ends a text, and llama.cpp's default for it is one that occurs in texts "
        f"({' or '.join(map(repr, default))}): name it in generation_config.json as eos_token_id, or use --formats onnx"
    )
