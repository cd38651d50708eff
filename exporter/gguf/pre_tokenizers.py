"""llama.cpp's names for the ways in which byte-level tokenizers cut text into words before merging.

llama.cpp does not read the expression from the file: it knows a fixed set by name (``llm_tokenizer_bpe`` in
``src/llama-vocab.cpp``). A wrong name gives other tokens without any warning, so an unknown expression is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressors.model.errors import UnsupportedError

__all__ = ["PRE_TOKENIZERS", "pre_tokenizer_name"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"

PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "starcoder",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_LLAMA3,), True): "llama-bpe",
    ((_TEKKEN,), True): "tekken",
}
"""(expressions in order, whether a word that is a token skips the merges) -> llama.cpp's name."""


def pre_tokenizer_name(tokenizer: Mapping[str, Any], path: Path) -> str:
    """The name for the pre-tokenizer of a parsed ``tokenizer.json``; ``path`` is for messages.

    Raises:
        UnsupportedError: llama.cpp has none that is known to be equal; the message shows the expressions.
    """
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":  # llama.cpp leaves text as it is; most text is NFC
        raise UnsupportedError(f"{path}: llama.cpp has no equivalent for the normalizer {normalizer['type']}")
    expressions = tuple(_expressions(tokenizer.get("pre_tokenizer") or {}, path))
    ignores_merges = bool(tokenizer["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((expressions, ignores_merges))
    if name is None:
        raise UnsupportedError(
            f"{path}: the pre-tokenizer {' then '.join(map(repr, expressions))} (ignore_merges {ignores_merges}) "
            "is none of those known to be in llama.cpp, which would split text otherwise than the model expects; "
            "use --formats onnx"
        )
    return name


def _expressions(step: Mapping[str, Any], path: Path) -> Iterator[str]:
    """The regular expressions that a pre-tokenizer applies one after another."""
    kind = step.get("type")
    if kind == "Sequence":
        for part in step["pretokenizers"]:
            yield from _expressions(part, path)
    elif kind == "Split" and "Regex" in step["pattern"] and not step["invert"]:
        yield step["pattern"]["Regex"]
    elif kind == "Digits" and step["individual_digits"]:
        yield _DIGIT
    elif kind == "ByteLevel" and not step["add_prefix_space"]:
        if step["use_regex"]:
            yield _GPT2
    else:
        raise UnsupportedError(f"{path}: llama.cpp has no equivalent for the pre-tokenizer step {dict(step)}")
