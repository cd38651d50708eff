"""Whether llama.cpp cuts text as the checkpoint's tokenizer does: compared before any work, by a file of metadata alone.

Ordinary text that is cut otherwise is refused: the model would read other words. What llama.cpp has no rule for, such
as spaces that a special token swallows, becomes a deviation that plan and report name.
"""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError, UnsupportedError
from compressors.model.shape import MoeShape
from compressors.model.special_tokens import special_tokens
from compressors.model.tokenizer_files import load_tokenizer, tokens_of
from exporter.gguf.container import render_header, render_values, string
from exporter.gguf.layout import architecture
from exporter.gguf.pre_tokenizers import steps_of
from exporter.gguf.special_values import tokens_around
from exporter.gguf.vocabulary import vocabulary_metadata
from validate.tokenization import AWKWARD_TEXTS, texts_around
from validate.vocabulary_process import LlamaTokens, ask_llama_cpp

__all__ = ["vocabulary_deviations"]

_SHOWN = 3  # texts or tokens of one sentence
_Rewriting = Callable[[str], str]
_Tokens = Mapping[str, tuple[int, ...]]  # by text


def vocabulary_deviations(folder: Path, shape: MoeShape, name: str) -> Iterator[str]:
    """Yields a sentence for each kind of difference that no GGUF file can mend.

    Args:
        folder: the checkpoint's.
        shape: the checkpoint's.
        name: that the file will give to the model; llama.cpp treats some models by it.

    Raises:
        InputError: the tokenizer is missing or damaged.
        UnsupportedError: llama.cpp cannot read it, or cuts ordinary text otherwise; the message shows which.
    """
    tokenizer = load_tokenizer(folder)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    added = list(tokenizer.get_added_vocab())
    rewritings = _rewritings(json.loads(tokenizer.backend_tokenizer.to_str()))
    texts = [*AWKWARD_TEXTS, *texts_around(added)]
    plain_texts = [*AWKWARD_TEXTS, *texts_around(special)]
    asked = list(dict.fromkeys([*texts, *(rewrite(text) for rewrite in rewritings.values() for text in texts)]))
    llama = _ask(folder, shape, name, asked)
    parsed, plain = (dict(zip(asked, tokens, strict=True)) for tokens in (llama.parsed, llama.plain))
    expected = dict(zip(texts, tokens_of(folder, texts), strict=True))
    read_as_text = tokens_of(folder, plain_texts, read_special_as_text=True)
    expected_plain = dict(zip(plain_texts, read_as_text, strict=True))
    sentences = [
        *_differences(folder, expected, parsed, rewritings, added, "around special tokens"),
        *_differences(folder, expected_plain, plain, rewritings, added, "in which special tokens are read as text"),
    ]
    yield from dict.fromkeys(sentences)
    first = AWKWARD_TEXTS[0]
    yield from _around_texts(folder, expected[first], llama.whole[asked.index(first)])
    yield from _ends_of_generation(folder, shape, llama.ends)


def _ask(folder: Path, shape: MoeShape, name: str, texts: Sequence[str]) -> LlamaTokens:
    values = {
        "general.architecture": string(architecture(shape)),
        "general.name": string(name),
        **vocabulary_metadata(folder, shape.vocab_size),
    }
    with tempfile.TemporaryDirectory(prefix="moe-export-") as place:
        file = Path(place) / "vocabulary.gguf"
        file.write_bytes(render_header(len(values), render_values(values), []))
        try:
            return ask_llama_cpp(file, texts)
        except InputError as error:
            reason = str(error).removeprefix(f"{file}: ").removesuffix("; convert the model again")
            raise UnsupportedError(
                f"{folder}: its tokenizer cannot be brought into a GGUF file ({reason}); use --formats onnx"
            ) from None


def _rewritings(tokenizer: Mapping[str, Any]) -> Mapping[str, _Rewriting]:
    """What the tokenizer does to a text before it cuts it, and llama.cpp does not, by the texts that it concerns."""
    rewritings: dict[str, _Rewriting] = {}
    if any(step["type"] == "NFC" for step in steps_of(tokenizer["normalizer"])):
        rewritings["that is not in Unicode's normal form C"] = lambda text: unicodedata.normalize("NFC", text)
    if any(step["type"] == "Metaspace" for step in steps_of(tokenizer["pre_tokenizer"])):
        rewritings["that begins with a space"] = lambda text: text[1:] if text.startswith((" ", "▁")) else text
    return rewritings


def _differences(
    folder: Path,
    expected: _Tokens,
    found: _Tokens,
    rewritings: Mapping[str, _Rewriting],
    added: Sequence[str],
    otherwise: str,
) -> Iterator[str]:
    """Yields a sentence for each reason why texts are cut otherwise; refuses where there is none."""
    by_reason: dict[str, list[str]] = {}
    for text, tokens in expected.items():
        if tokens == found[text]:
            continue
        reasons = [what for what, rewrite in rewritings.items() if found[rewrite(text)] == tokens]
        if not reasons and not any(token in text for token in added):
            raise UnsupportedError(
                f"{folder}: llama.cpp would cut text otherwise than the model's tokenizer, such as {_short(text)} into "
                f"{_listed(found[text])} instead of {_listed(tokens)}; use --formats onnx"
            )
        by_reason.setdefault(reasons[0] if reasons else otherwise, []).append(text)
    for reason, texts in by_reason.items():
        yield f"llama.cpp cuts text {reason} otherwise, such as {' and '.join(map(_short, texts[:_SHOWN]))}"


def _around_texts(folder: Path, text: Sequence[int], llama_whole: Sequence[int]) -> Iterator[str]:
    """Compares what is put before and behind a text of its own accord; the first of the page stands for all."""
    tokenizer = load_tokenizer(folder)
    whole = tokenizer.encode(AWKWARD_TEXTS[0])
    wanted, found = tokens_around(whole, text), tokens_around(llama_whole, text)
    for where, tokens, others in zip(("before", "behind"), wanted, found, strict=True):
        if tokens != others:
            names, other_names = (_named(folder, ids) or "nothing" for ids in (tokens, others))
            yield f"the model's tokenizer puts {names} {where} a text, llama.cpp {other_names}"


def _ends_of_generation(folder: Path, shape: MoeShape, found: frozenset[int]) -> Iterator[str]:
    """Compares the tokens at which a text ends: llama.cpp has keys for three, and knows some by their text alone."""
    tokenizer = load_tokenizer(folder)
    wanted = set(special_tokens(folder, shape.vocab_size).ends)
    used = set(tokenizer.get_vocab().values())  # rows without a token stand for no end
    if missing := _named(folder, sorted(wanted - found)):
        yield f"llama.cpp does not end a text at {missing}, though the model does"
    if further := _named(folder, sorted((found & used) - wanted)):
        yield f"llama.cpp ends a text at {further} too, which the model's files do not name as end of a text"


def _named(folder: Path, tokens: Sequence[int]) -> str:
    """All tokens by their texts, for a sentence; empty for none."""
    return ", ".join(load_tokenizer(folder).convert_ids_to_tokens(list(tokens)))


def _short(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 48 else f"{shown[:44]}...'"


def _listed(tokens: Sequence[int]) -> str:
    return f"[{', '.join(map(str, tokens[:8]))}{', ...' if len(tokens) > 8 else ''}]"
