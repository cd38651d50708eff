"""llama.cpp's names for the ways in which byte-level tokenizers cut text into words before merging.

llama.cpp does not read the expression from the file: it knows a fixed set by name (``llm_tokenizer_bpe`` in
``src/llama-vocab.cpp``). A wrong name gives other tokens without any warning, so an unknown expression is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressors.model.errors import UnsupportedError

__all__ = ["CLOSE_PRE_TOKENIZERS", "PRE_TOKENIZERS"]
__all__ += ["is_byte_level", "pre_tokenizer_name", "refuse_unknown_normalizer", "steps_of"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (  # words by upper and lower case, as o200k cuts them
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASH_TAIL}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_SEED = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"
_SPACE_STEPS = (
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
)
"""Normalizers that write spaces as SentencePiece does."""

PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "starcoder",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_LLAMA3,), True): "llama-bpe",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
    (_DEEPSEEK3, False): "deepseek-v3",
    ((_SEED,), False): "seed-coder",
    ((_BAILING,), False): "bailingmoe",
    ((_EXAONE_MOE,), False): "exaone-moe",
}
"""(expressions in order, whether a word that is a token skips the merges) -> llama.cpp's name."""

CLOSE_PRE_TOKENIZERS = frozenset({"tekken", "gpt-4o"})
"""Names whose rule llama.cpp only approximates: outside of ASCII it ignores letter case and marks."""


def steps_of(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer in a parsed ``tokenizer.json``; a sequence may hold sequences."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for key in ("normalizers", "pretokenizers"):
        for step in part.get(key, ()):
            yield from steps_of(step)


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """True if a parsed ``tokenizer.json`` merges bytes (written as characters) instead of characters."""
    return any(step["type"] == "ByteLevel" for step in steps_of(tokenizer.get("pre_tokenizer")))


def refuse_unknown_normalizer(tokenizer: Mapping[str, Any], path: Path) -> None:
    """Checks every step of the normalizer of a parsed ``tokenizer.json``; ``path`` is for messages.

    llama.cpp leaves text as it is. Most text is in Unicode's normal form C, and its SentencePiece tokenizers write
    spaces as ``▁``.

    Raises:
        UnsupportedError: a step changes ordinary text; the message names it.
    """
    spaces = [] if is_byte_level(tokenizer) else _SPACE_STEPS
    for step in steps_of(tokenizer.get("normalizer")):
        if step["type"] != "NFC" and dict(step) not in spaces:
            raise UnsupportedError(
                f"{path}: llama.cpp has no equivalent for the normalizer {step['type']}"
                f"{_settings(step)}, which changes ordinary text; use --formats onnx"
            )


def _settings(step: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in step.items() if key != "type"}
    return f" {shown}"[:120] if shown else ""


def pre_tokenizer_name(tokenizer: Mapping[str, Any], path: Path) -> str:
    """The name for the pre-tokenizer of a parsed ``tokenizer.json``; ``path`` is for messages.

    Raises:
        UnsupportedError: llama.cpp has no pre-tokenizer that is known to be equal; the message shows the expressions.
    """
    if not is_byte_level(tokenizer):
        kinds = [step["type"] for step in steps_of(tokenizer.get("pre_tokenizer"))] or ["none"]
        raise UnsupportedError(
            f"{path}: llama.cpp knows BPE over bytes (a ByteLevel pre-tokenizer) and BPE with byte fallback; this "
            f"tokenizer is neither (pre-tokenizer {', '.join(kinds)}): use --formats onnx"
        )
    expressions = tuple(
        expression
        for step in steps_of(tokenizer["pre_tokenizer"])
        if (expression := _expression(step, path)) is not None
    )
    ignores_merges = bool(tokenizer["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((expressions, ignores_merges))
    if name is None:
        raise UnsupportedError(
            f"{path}: the pre-tokenizer {' then '.join(map(repr, expressions))} (ignore_merges {ignores_merges}) "
            "is not known to be in llama.cpp, which would split text differently from what the model expects; "
            "use --formats onnx"
        )
    return name


def _expression(step: Mapping[str, Any], path: Path) -> str | None:
    """The regular expression that a step cuts text by; None if it does not cut."""
    kind = step["type"]
    if kind == "Split" and "Regex" in step["pattern"] and _isolates(step):
        expression: str = step["pattern"]["Regex"]
        return expression
    if kind == "Digits" and step["individual_digits"]:
        return _DIGIT
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return _GPT2 if step["use_regex"] else None
    raise UnsupportedError(
        f"{path}: llama.cpp has no equivalent for the pre-tokenizer step {dict(step)}; use --formats onnx"
    )


def _isolates(step: Mapping[str, Any]) -> bool:
    """True if matches become words, and the text between them too, as in llama.cpp.

    The behaviour Removed with an inverted match gives the same if the expression matches all of the text.
    """
    return (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
