"""Tokenizers that merge letters instead of bytes, with spaces written as ``▁``, and bytes for unknown letters.

llama.cpp has two ways to merge them. Its SentencePiece tokenizer (model ``llama``) merges the pair whose union has the
highest score, whatever the union was made of, and may put a space before a text. The other merges by the list of
merges between line ends: for Gemma (model ``gemma4``), where it begins every text with BOS, and for all others
(``gpt2`` with ``sarvam-moe``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf.constants import Keys, TokenType

from compressors.model.errors import UnsupportedError
from exporter.writing.gguf.container import Value, boolean, float32_array, int32_array, string, string_array
from exporter.writing.gguf.vocabulary.pre_tokenizers import steps_of

__all__ = ["SPACE_STEPS", "has_byte_tokens", "is_byte_token", "prepends_space", "sentencepiece_values"]

_SPACE = "▁"
SPACE_STEPS = (
    {"type": "Prepend", "prepend": _SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
)
"""Normalizers that write spaces as SentencePiece does: one in front of the text, and those inside."""

_GEMMA_BEGIN = "<bos>"
_GEMMA_VISIBLE = frozenset({
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
})  # fmt: skip
"""Gemma's tokens around thoughts and calls, which llama.cpp's clients read in the text that the model writes."""
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_NO_SCORE = -1000.0  # llama.cpp's converter gives it to tokens of which it knows no score


def sentencepiece_values(
    tokenizer: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], begin: str | None, path: Path
) -> dict[str, Value]:
    """The keys of the tokens, of their scores and of merges.

    Args:
        tokenizer: a parsed ``tokenizer.json`` of BPE with byte fallback.
        tokens: texts by token id.
        types: ``gguf.TokenType`` by token id.
        begin: the token that begins texts.
        path: the file, for messages.

    Raises:
        UnsupportedError: llama.cpp cuts text otherwise; the message names the step or the tokens.
    """
    _refuse_other_steps(tokenizer, path)
    kinds = [_with_bytes(token, kind) for token, kind in zip(tokens, types, strict=True)]
    if begin == _GEMMA_BEGIN and not prepends_space(tokenizer):
        shown = _with_kind(TokenType.USER_DEFINED, _GEMMA_VISIBLE, tokens, kinds)
        scores = {Keys.Tokenizer.SCORES: float32_array([_NO_SCORE] * len(tokens))}
        begins = {Keys.Tokenizer.ADD_BOS: boolean(True)}  # llama.cpp does so even if it is false
        return {**_merging_values("gemma4", None, tokenizer, tokens, shown, path), **scores, **begins}
    kinds = _with_kind(TokenType.UNKNOWN, {tokenizer["model"].get("unk_token")}, tokens, kinds)
    if prepends_space(tokenizer) or _merges_by_scores(tokenizer):
        return _scored_values(tokenizer, tokens, kinds)
    return _merging_values("gpt2", "sarvam-moe", tokenizer, tokens, kinds, path)


def _with_kind(
    kind: TokenType, texts: Collection[str | None], tokens: Sequence[str], types: Sequence[int]
) -> list[int]:
    return [int(kind) if token in texts else before for token, before in zip(tokens, types, strict=True)]


def _refuse_other_steps(tokenizer: Mapping[str, Any], path: Path) -> None:
    """Refuses steps that cut text, but for those that only treat spaces."""
    replaces = any(_replaces_spaces(step) for step in steps_of(tokenizer.get("normalizer")))
    for step in steps_of(tokenizer.get("pre_tokenizer")):
        if not (step["type"] == "Metaspace" or (replaces and _splits_at_spaces(step))):
            raise UnsupportedError(
                f"{path}: llama.cpp's tokenizers of SentencePiece's kind have no equivalent for the pre-tokenizer step "
                f"{dict(step)}; use --formats onnx"
            )


def _replaces_spaces(step: Mapping[str, Any]) -> bool:
    return dict(step) == SPACE_STEPS[1]


def _splits_at_spaces(step: Mapping[str, Any]) -> bool:
    return step["type"] == "Split" and step["pattern"] in ({"String": " "}, {"Regex": " "})


def prepends_space(tokenizer: Mapping[str, Any]) -> bool:
    """True if a space is put before the text: by a normalizer in older files, by the pre-tokenizer in newer ones."""
    return any(step["type"] == "Prepend" for step in steps_of(tokenizer.get("normalizer"))) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in steps_of(tokenizer.get("pre_tokenizer"))
    )


def is_byte_token(token: str) -> bool:
    """True for a text such as ``<0x0A>``."""
    return len(token) == len(_BYTES[0]) and token.startswith("<0x") and token.endswith(">")


def has_byte_tokens(tokens: Sequence[str]) -> bool:
    """True if there is a token for every byte."""
    return set(_BYTES) <= set(tokens)


def _with_bytes(token: str, token_type: int) -> int:
    return TokenType.BYTE if is_byte_token(token) and token_type == TokenType.NORMAL else token_type


def _scored_values(tokenizer: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Value]:
    """Scores for llama.cpp's SentencePiece tokenizer: minus the place of the first merge that makes a token."""
    ranks: dict[str, int] = {}
    merges = tokenizer["model"]["merges"]
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    return {
        Keys.Tokenizer.MODEL: string("llama"),
        Keys.Tokenizer.PRE: string("default"),
        Keys.Tokenizer.LIST: string_array(tokens),
        Keys.Tokenizer.SCORES: float32_array(scores),
        Keys.Tokenizer.TOKEN_TYPE: int32_array(types),
        Keys.Tokenizer.ADD_PREFIX: boolean(prepends_space(tokenizer)),
    }


def _merging_values(
    model: str,
    pre: str | None,
    tokenizer: Mapping[str, Any],
    tokens: Sequence[str],
    types: Sequence[int],
    path: Path,
) -> dict[str, Value]:
    """The list of merges, for llama.cpp's BPE over letters between line ends."""
    across = [left + right for left, right in tokenizer["model"]["merges"] if _holds_a_line_end(left + right)]
    if across:
        raise UnsupportedError(
            f"{path}: its token {across[0]!r} goes beyond a line end, and llama.cpp cuts text there; use --formats onnx"
        )
    if not has_byte_tokens(tokens):
        raise UnsupportedError(
            f"{path}: it has no token for some bytes, and llama.cpp would leave out the letters that need them; use "
            "--formats onnx"
        )
    return {
        Keys.Tokenizer.MODEL: string(model),
        **({Keys.Tokenizer.PRE: string(pre)} if pre else {}),
        Keys.Tokenizer.LIST: string_array(tokens),
        Keys.Tokenizer.TOKEN_TYPE: int32_array(types),
        Keys.Tokenizer.MERGES: string_array([f"{left} {right}" for left, right in tokenizer["model"]["merges"]]),
        Keys.Tokenizer.ADD_PREFIX: boolean(False),
    }


def _holds_a_line_end(token: str) -> bool:
    """True if something else stands beside a line end."""
    return "\n" in token and bool(token.strip("\n"))


def _merges_by_scores(tokenizer: Mapping[str, Any]) -> bool:
    """True if one score per token orders the merges: all that make a token follow each other, and none is missing."""
    made = [left + right for left, right in tokenizer["model"]["merges"]]
    firsts = [token for token, before in zip(made, [None, *made], strict=False) if token != before]
    if len(firsts) > len(set(firsts)):
        return False
    counts = dict.fromkeys(firsts, 0)
    for token in made:
        counts[token] += 1
    vocabulary, added = tokenizer["model"]["vocab"], {entry["content"] for entry in tokenizer["added_tokens"]}
    return all(
        counts.get(token, 0) == sum(1 for _ in _splits(token, vocabulary))
        for token in vocabulary
        if token not in added and not is_byte_token(token)
    )


def _splits(token: str, vocabulary: Mapping[str, int]) -> Iterator[int]:
    """The places at which a token falls into two tokens."""
    return (place for place in range(1, len(token)) if token[:place] in vocabulary and token[place:] in vocabulary)
