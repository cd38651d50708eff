"""SentencePiece's unigram tokenizers: the most probable tokens of a text (llama.cpp's model ``t5``)."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf.constants import Keys, TokenType

from compressors.model.errors import UnsupportedError
from exporter.writing.gguf.container import (
    Value,
    boolean,
    float32_array,
    int8_array,
    int32_array,
    string,
    string_array,
)
from exporter.writing.gguf.vocabulary.pre_tokenizers import steps_of
from exporter.writing.gguf.vocabulary.sentencepiece import SPACE_STEPS, prepends_space

__all__ = ["unigram_values"]

_SEVERAL_SPACES = " {2,}"
_PADDING_SCORE = -1000.0


def unigram_values(
    tokenizer: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], path: Path
) -> dict[str, Value]:
    """The keys of the tokens, of their log-probabilities, and of what is done to a text before.

    Args:
        tokenizer: a parsed ``tokenizer.json`` of the type Unigram.
        tokens: texts by token id.
        types: ``gguf.TokenType`` by token id.
        path: the file, for messages.

    Raises:
        UnsupportedError: llama.cpp treats text otherwise; the message names the step.
    """
    model = tokenizer["model"]
    if model.get("byte_fallback"):
        raise UnsupportedError(
            f"{path}: its unigram model writes unknown letters as bytes, and llama.cpp's has one unknown token for all "
            "of them; use --formats onnx"
        )
    scores = dict(model["vocab"])
    unknown = None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    kinds = [int(TokenType.UNKNOWN) if token == unknown else kind for token, kind in zip(tokens, types, strict=True)]
    charsmap, merges_spaces = _normalizing(tokenizer, path)
    _refuse_other_words(tokenizer, path)
    return {
        Keys.Tokenizer.MODEL: string("t5"),
        Keys.Tokenizer.PRE: string("default"),
        Keys.Tokenizer.LIST: string_array(tokens),
        Keys.Tokenizer.SCORES: float32_array([scores.get(token, _PADDING_SCORE) for token in tokens]),
        Keys.Tokenizer.TOKEN_TYPE: int32_array(kinds),
        Keys.Tokenizer.ADD_PREFIX: boolean(prepends_space(tokenizer)),
        Keys.Tokenizer.REMOVE_EXTRA_WS: boolean(merges_spaces),
        **({Keys.Tokenizer.PRECOMPILED_CHARSMAP: int8_array(charsmap)} if charsmap else {}),
    }


def _normalizing(tokenizer: Mapping[str, Any], path: Path) -> tuple[bytes, bool]:
    """SentencePiece's table of characters, and whether llama.cpp is to leave out spaces beside others.

    llama.cpp looks characters up first. It leaves out spaces at the end of a text too, so both have to be asked for.
    """
    steps = list(steps_of(tokenizer.get("normalizer")))
    charsmap = b""
    if steps and steps[0]["type"] == "Precompiled":
        charsmap = base64.b64decode(steps.pop(0)["precompiled_charsmap"] or "")
    at_end = [step for step in steps if step["type"] == "Strip" and step["strip_right"]]
    several = [step for step in steps if step["type"] == "Replace" and step["pattern"] == {"Regex": _SEVERAL_SPACES}]
    spaces = [*at_end, *several] if at_end and several else []
    other = next((step for step in steps if step not in spaces and dict(step) not in SPACE_STEPS), None)
    if other is not None:
        raise UnsupportedError(
            f"{path}: llama.cpp's unigram tokenizer has no equivalent for the normalizer {dict(other)}; use --formats "
            "onnx"
        )
    return charsmap, bool(spaces)


def _refuse_other_words(tokenizer: Mapping[str, Any], path: Path) -> None:
    for step in steps_of(tokenizer.get("pre_tokenizer")):
        if step["type"] != "Metaspace":
            raise UnsupportedError(
                f"{path}: llama.cpp's unigram tokenizer has no equivalent for the pre-tokenizer step {dict(step)}; use "
                "--formats onnx"
            )
