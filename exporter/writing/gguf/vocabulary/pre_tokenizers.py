"""Finds llama.cpp's name for the way in which a byte-level tokenizer cuts text into words before merging.

A wrong name gives other tokens without any warning. So a rule is recognised by its expressions, never by a hash of
some tokens, and what is not known to be equal is refused.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.model.errors import UnsupportedError
from compressors.model.files.gguf.pre_tokenizers import (
    BYTE_LEVEL_WORDS,
    DIGIT,
    PRE_TOKENIZERS,
    KnownDifference,
    PreTokenizer,
)

__all__ = ["is_byte_level", "known_differences", "known_pre_tokenizer", "plain_expression", "steps_of"]

_SHOWN = 3  # tokens that a message names
_SHOWN_LENGTH = 60  # characters of an expression, around the place of interest
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLINGS = (  # other ways to write the same, each with the one of the table
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
    ("'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])", _CONTRACTIONS),
    (r"\p{N}{1}", r"\p{N}"),
    (r"\p{Han}+|", r"[\p{Han}]+|"),
    # a quantifier that gives nothing back, before something that it could not match; {1,3}+ is none in these files
    (r"[^\r\n\p{L}\p{N}]?+\p{L}", r"[^\r\n\p{L}\p{N}]?\p{L}"),
    (r"[^\s\p{L}\p{N}]++[\r\n]", r"[^\s\p{L}\p{N}]+[\r\n]"),
    (r"\p{L}++|", r"\p{L}+|"),
    (r"[\r\n]*+|", r"[\r\n]*|"),
)


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


def plain_expression(expression: str) -> str:
    """Writes an expression as the table does, where files write the same differently."""
    for other, spelling in _SPELLINGS:
        expression = expression.replace(other, spelling)
    return unicodedata.normalize("NFC", expression)


def known_pre_tokenizer(tokenizer: Mapping[str, Any], path: Path) -> PreTokenizer:
    """The rule of llama.cpp for the pre-tokenizer of a parsed ``tokenizer.json``; ``path`` is for messages.

    Raises:
        UnsupportedError: llama.cpp has no rule that is known to be equal; the message shows the expressions and the
            rule that comes nearest.
    """
    rule = _by_use_of_merges(_rules(tokenizer, path), tokenizer, path)
    made = (left + right for left, right in tokenizer["model"]["merges"])
    joined = [] if rule.apart is None else [token for token in made if re.search(rule.apart, token)]
    if joined:
        raise UnsupportedError(
            f"{path}: its merges put together what its pre-tokenizer separates ({_some(joined)}), and llama.cpp's rule "
            f"for it, {rule.name}, does not separate it; use --formats onnx"
        )
    return rule


def known_differences(tokenizer: Mapping[str, Any], path: Path) -> tuple[KnownDifference, ...]:
    """The texts that llama.cpp cuts otherwise than the pre-tokenizer; vocabulary and merges are not looked at.

    Raises:
        UnsupportedError: llama.cpp has no rule that is known to be equal.
    """
    return _rules(tokenizer, path)[0].differs


def _rules(tokenizer: Mapping[str, Any], path: Path) -> list[PreTokenizer]:
    """The rules that cut text by the same expressions."""
    expressions = tuple(
        plain_expression(expression)
        for step in steps_of(tokenizer["pre_tokenizer"])
        if (expression := _expression(step, path)) is not None
    )
    rules = [rule for rule in PRE_TOKENIZERS if _plain_expressions(rule) == expressions]
    if not rules:
        raise UnsupportedError(
            f"{path}: the pre-tokenizer {_listed(expressions)} is not known to be in llama.cpp, which would split text "
            f"differently from what the model expects; {_nearest(expressions)}; use --formats onnx"
        )
    return rules


@functools.cache
def _plain_expressions(rule: PreTokenizer) -> tuple[str, ...]:
    return tuple(map(plain_expression, rule.expressions))


def _by_use_of_merges(rules: Sequence[PreTokenizer], tokenizer: Mapping[str, Any], path: Path) -> PreTokenizer:
    """Chooses the rule that ignores merges as the tokenizer does; any, if merges make every word that is a token."""
    ignores_merges = bool(tokenizer["model"].get("ignore_merges"))
    for rule in rules:
        if rule.ignores_merges == ignores_merges:
            return rule
    unmade = _words_without_merges(tokenizer)
    if unmade:
        raise UnsupportedError(
            f"{path}: model.ignore_merges is {str(ignores_merges).lower()}, llama.cpp's rule for this pre-tokenizer "
            f"({rules[0].name}) has the opposite, and it matters: {len(unmade):,} words are tokens that no merges make "
            f"({_some(unmade)}); use --formats onnx"
        )
    return rules[0]


def _words_without_merges(tokenizer: Mapping[str, Any]) -> list[str]:
    """The tokens that the pre-tokenizer leaves whole, and that merges alone do not put together."""
    from tokenizers import Tokenizer, decoders, models

    model = tokenizer["model"]
    merged = models.BPE(vocab=model["vocab"], merges=[(left, right) for left, right in model["merges"]])
    candidates = [token for token in model["vocab"] if len(merged.tokenize(token)) > 1]
    if not candidates:
        return []
    small = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    cutting = Tokenizer.from_str(json.dumps({**small, "pre_tokenizer": tokenizer["pre_tokenizer"]})).pre_tokenizer
    texts = {token: decoders.ByteLevel().decode([token]) for token in candidates}
    return [token for token, text in texts.items() if len(cutting.pre_tokenize_str(text)) == 1]


def _expression(step: Mapping[str, Any], path: Path) -> str | None:
    """The regular expression that a step cuts text by; None if it does not cut."""
    kind = step["type"]
    if kind == "Split" and "Regex" in step["pattern"] and _isolates(step):
        expression: str = step["pattern"]["Regex"]
        return expression
    if kind == "Digits" and step["individual_digits"]:
        return DIGIT
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return BYTE_LEVEL_WORDS if step["use_regex"] else None
    raise UnsupportedError(
        f"{path}: llama.cpp has no equivalent for the pre-tokenizer step {dict(step)}; use --formats onnx"
    )


def _isolates(step: Mapping[str, Any]) -> bool:
    """True if matches become words, and the text between them too, as in llama.cpp.

    The behaviour Removed with an inverted match gives the same if the expression matches all of the text.
    """
    return (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))


def _nearest(expressions: Sequence[str]) -> str:
    """Names the rule that has most alternatives in common with these expressions, and the first place of difference."""
    wanted = " then ".join(expressions)

    def likeness(rule: PreTokenizer) -> float:
        found = " then ".join(_plain_expressions(rule))
        return difflib.SequenceMatcher(None, wanted.split("|"), found.split("|"), autojunk=False).ratio()

    nearest = max(PRE_TOKENIZERS, key=likeness)
    found = " then ".join(_plain_expressions(nearest))
    pairs = enumerate(zip(wanted, found, strict=False))
    place = next((index for index, (one, other) in pairs if one != other), min(len(wanted), len(found)))
    start = max(0, place - _SHOWN_LENGTH // 3)
    shown = found[start : start + _SHOWN_LENGTH]
    return f"the nearest that it has is {nearest.name}, with {shown!r} for {wanted[start : start + _SHOWN_LENGTH]!r}"


def _listed(expressions: Sequence[str]) -> str:
    return " then ".join(map(repr, expressions)) or "without any expression"


def _some(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - _SHOWN:,} more" if len(tokens) > _SHOWN else ""
    return ", ".join(map(repr, tokens[:_SHOWN])) + more
