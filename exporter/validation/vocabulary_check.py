"""Compares llama.cpp's tokens with those of the checkpoint's tokenizer before any work, by a file of metadata alone.

If ordinary text is cut differently, the model is refused: it would read other words. Differences that come from a rule
that llama.cpp lacks, such as special tokens that swallow spaces, become deviations that plan and report name.
"""

from __future__ import annotations

import json
import re
import tempfile
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressors.model.config.special_tokens import special_tokens
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.gguf.pre_tokenizers import KnownDifference
from compressors.model.files.plain_tokenizer import PlainTokenizer
from compressors.model.files.tokenizer_files import open_tokenizer, tokens_of
from exporter.writing.gguf.container import Value, render_header, render_values, string
from exporter.writing.gguf.vocabulary.metadata import vocabulary_metadata
from exporter.writing.gguf.vocabulary.pre_tokenizers import is_byte_level, known_differences, steps_of
from exporter.writing.gguf.vocabulary.special_values import tokens_around
from validate.vocabulary.tokenization import AWKWARD_TEXTS, texts_around
from validate.vocabulary.vocabulary_process import LlamaTokens, ask_llama_cpp

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["vocabulary_deviations"]

_SHOWN = 3  # texts or tokens that one sentence names
_Rewriting = Callable[[str], str]
_Tokens = Mapping[str, tuple[int, ...]]  # by text


def vocabulary_deviations(folder: Path, spec: ModelSpec, name: str) -> Iterator[str]:
    """Yields a sentence for each kind of difference that no GGUF file can avoid.

    Args:
        folder: the checkpoint's folder.
        spec: the checkpoint's model.
        name: the name of the model in the file; llama.cpp treats some models by their name.

    Raises:
        InputError: the tokenizer is missing or damaged.
        UnsupportedError: llama.cpp cannot read it, or cuts ordinary text differently; the message shows which.
    """
    vocabulary = vocabulary_metadata(folder, spec.vocab_size)
    tokenizer = open_tokenizer(folder)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = [*AWKWARD_TEXTS, *texts_around(tokenizer.get_added_vocab())]
    plain_texts = [*AWKWARD_TEXTS, *texts_around(special)]
    parts = _parts(tokenizer)
    rewritings = _rewritings(parts)
    asked = list(dict.fromkeys([*texts, *(rewrite(text) for rewrite in rewritings.values() for text in texts)]))
    llama = _ask(folder, spec, name, vocabulary, asked)
    marks = llama.marks | set(tokenizer.get_added_vocab())
    differences = known_differences(parts, folder) if is_byte_level(parts) else ()
    judge = _Judge(folder, rewritings, marks, differences)
    parsed, plain = (dict(zip(asked, tokens, strict=True)) for tokens in (llama.parsed, llama.plain))
    read_as_text = tokens_of(folder, plain_texts, read_special_as_text=True)
    sentences = [
        *judge.sentences(zip(texts, tokens_of(folder, texts), strict=True), parsed, "around special tokens"),
        *judge.sentences(
            zip(plain_texts, read_as_text, strict=True), plain, "in which special tokens are to be read as text"
        ),
    ]
    yield from dict.fromkeys(sentences)
    yield from _around_texts(folder, llama.parsed[0], llama.whole[0])
    yield from _ends_of_generation(folder, spec, llama.ends)


def _ask(
    folder: Path, spec: ModelSpec, name: str, vocabulary: Mapping[str, Value], texts: Sequence[str]
) -> LlamaTokens:
    values = {
        "general.architecture": string(spec.written.family.gguf.architecture),
        "general.name": string(name),
        **vocabulary,
    }
    with tempfile.TemporaryDirectory(prefix="moe-export-") as place:
        file = Path(place) / "vocabulary.gguf"
        file.write_bytes(render_header(len(values), render_values(values), []))
        try:
            return ask_llama_cpp(file, texts)
        except InputError as error:
            reason = str(error).removeprefix(f"{file}: ").removesuffix("; convert the model again")
            raise UnsupportedError(
                f"{folder}: its tokenizer cannot be brought into a GGUF file ({reason}); {_instead(name)}"
            ) from None


def _instead(name: str) -> str:
    """The advice; llama.cpp takes models for Phi-3 by their name and requires its tokens (``src/llama-vocab.cpp``)."""
    if any(mark in name.lower() for mark in ("phi-3", "phi3")):
        return f"llama.cpp takes a model named {name!r} for Phi-3, whose tokens it lacks: give it another name"
    return "use --formats onnx"


def _parts(tokenizer: PlainTokenizer | PreTrainedTokenizerFast) -> dict[str, Any]:
    """A ``tokenizer.json`` without vocabulary and merges, which take long to write and to read."""
    backend = tokenizer.backend_tokenizer
    steps = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    return {name: None if step is None else json.loads(step.__getstate__()) for name, step in steps.items()}


def _rewritings(tokenizer: Mapping[str, Any]) -> Mapping[str, _Rewriting]:
    """The changes that the tokenizer makes to a text before it cuts it, and llama.cpp does not; by kind of text."""
    rewritings: dict[str, _Rewriting] = {}
    if any(step["type"] == "NFC" for step in steps_of(tokenizer["normalizer"])):
        reason = "whose accents are characters of their own (not in Unicode's normal form C)"
        rewritings[reason] = lambda text: unicodedata.normalize("NFC", text)
    if any(step["type"] == "Metaspace" for step in steps_of(tokenizer["pre_tokenizer"])):
        rewritings["that begins with a space"] = lambda text: text[1:] if text.startswith((" ", "▁")) else text
    return rewritings


@dataclass(frozen=True)
class _Judge:
    """Finds the reason why a text is cut differently, and refuses the model if there is none."""

    folder: Path
    rewritings: Mapping[str, _Rewriting]
    marks: Collection[str]  # texts of special tokens, of either side
    differences: Sequence[KnownDifference]  # of llama.cpp's pre-tokenizer

    def sentences(self, expected: Iterable[tuple[str, tuple[int, ...]]], found: _Tokens, around: str) -> Iterator[str]:
        """Yields a sentence for each reason, with some of its texts; ``around`` is one, for texts with special tokens.

        Raises:
            UnsupportedError: ordinary text is cut differently.
        """
        by_reason: dict[str, list[str]] = {}
        for text, tokens in expected:
            if tokens != found[text]:
                by_reason.setdefault(self._reason(text, tokens, found, around), []).append(text)
        for reason, texts in by_reason.items():
            different = {self._form(text): text for text in texts}  # tokens added last, such as turns, stand for all
            shown = " and ".join(map(_short, sorted(different.values(), key=len)[:_SHOWN]))
            yield f"llama.cpp cuts text {reason} otherwise, such as {shown}"

    def _form(self, text: str) -> str:
        """A text without the parts that distinguish its special tokens."""
        for mark in self.marks:
            text = text.replace(mark, "")
        return text

    def _reason(self, text: str, tokens: tuple[int, ...], found: _Tokens, around: str) -> str:
        for what, rewrite in self.rewritings.items():
            if found[rewrite(text)] == tokens:
                return what
        if any(mark in text for mark in self.marks):
            return around
        for difference in self.differences:
            if re.search(difference.where, text):
                return difference.words
        raise UnsupportedError(
            f"{self.folder}: llama.cpp would cut text otherwise than the model's tokenizer, such as {_short(text)} "
            f"into {_listed(found[text])} instead of {_listed(tokens)}; use --formats onnx"
        )


def _around_texts(folder: Path, parsed: Sequence[int], whole: Sequence[int]) -> Iterator[str]:
    """Compares the tokens that both sides put before and behind a text, with the first text of the page."""
    tokenizer, text = open_tokenizer(folder), AWKWARD_TEXTS[0]
    wanted = tokens_around(tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False))
    for where, tokens, others in zip(("before", "behind"), wanted, tokens_around(whole, parsed), strict=True):
        if tokens != others:
            names, other_names = (_named(folder, ids) or "nothing" for ids in (tokens, others))
            yield f"the model's tokenizer puts {names} {where} a text, llama.cpp {other_names}"


def _ends_of_generation(folder: Path, spec: ModelSpec, found: frozenset[int]) -> Iterator[str]:
    """Compares the tokens at which a text ends: llama.cpp has keys for three, and knows some by their text alone."""
    tokenizer = open_tokenizer(folder)
    wanted = set(special_tokens(folder, spec.vocab_size).ends)
    used = {token for token in found if tokenizer.convert_ids_to_tokens(token) is not None}  # others are only rows
    if missing := _named(folder, sorted(wanted - found)):
        yield f"llama.cpp does not end a text at {missing}, though the model does"
    if further := _named(folder, sorted(used - wanted)):
        yield f"llama.cpp ends a text at {further} too, which the model's files do not name as end of a text"


def _named(folder: Path, tokens: Sequence[int]) -> str:
    """All tokens by their texts, for a sentence; empty for none."""
    return ", ".join(open_tokenizer(folder).convert_ids_to_tokens(list(tokens)))


def _short(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 48 else f"{shown[:44]}...'"


def _listed(tokens: Sequence[int]) -> str:
    return f"[{', '.join(map(str, tokens[:8]))}{', ...' if len(tokens) > 8 else ''}]"
