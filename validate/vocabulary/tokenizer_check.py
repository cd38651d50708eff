"""Checks whether a file's own tokenizer is the original's: tokens, their kinds, how it cuts text, and where texts end.

Clients use the tokenizer of the file, so this one is tested here, inside llama.cpp or as the folder's, not the
original's. The texts are every token's own, those that go wrong in practice, and the held-out text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api

from compressors.model.files.tokenizer_files import load_tokenizer, read_tokenizer_json
from compressors.model.sources.gguf_settings import MetadataValue
from validate.vocabulary.original_tokenizer import OriginalTokenizer
from validate.vocabulary.special_token_check import folder_special_symptoms, gguf_special_symptoms
from validate.vocabulary.tokenization import AWKWARD_TEXTS, Difference, Encode, tokenization_differences
from validate.vocabulary.vocabulary import GgufVocabulary

__all__ = ["TokenizerFindings", "check_folder_tokenizer", "check_gguf_tokenizer"]

_SHOWN = 3  # tokens and texts that a sentence names
_TEXT_SHOWN = 40  # characters of a text
_AROUND = 3  # tokens of a difference
_SHOWN_IN_TEXTS = frozenset({
    "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>",
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
})  # fmt: skip
"""Special tokens that llama.cpp, or its converter, shows in the text that a model writes, for clients to read."""


@dataclass(frozen=True)
class TokenizerFindings:
    """The faults of a file's tokenizer, in sentences.

    Attributes:
        symptoms: faults of tokens and texts.
        settings: faults of special tokens, flags and templates.
        notes: differences that no file of this format can avoid.
        texts: the number of texts that were compared.
    """

    symptoms: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    texts: int = 0


def check_gguf_tokenizer(
    path: Path,
    metadata: Mapping[str, MetadataValue],
    original: OriginalTokenizer,
    chunks: Iterable[Sequence[int]],
    best: Callable[[], Encode | None],
) -> TokenizerFindings:
    """Compares a file's vocabulary, as llama.cpp reads it, with the original's tokenizer.

    Args:
        path: the GGUF file.
        metadata: its single values.
        original: the original's tokenizer.
        chunks: tokens of text, which are decoded and cut again.
        best: returns llama.cpp's tokenizer with the vocabulary that our exporter writes, None if it writes none. It is
            called only if there are differences; those that it has too cannot be avoided in any file.

    Raises:
        InputError: llama.cpp cannot read the vocabulary.
    """
    findings = TokenizerFindings()
    kind = metadata.get("tokenizer.ggml.model")
    if original.is_byte_level and kind != "gpt2":  # llama.cpp dies of some vocabularies of the wrong kind
        findings.symptoms.append(f"tokenizer: its kind is {kind!r}; the original's, byte-level BPE, is 'gpt2'")
        return findings
    vocabulary = GgufVocabulary(path)
    findings.symptoms.extend(_token_symptoms(vocabulary.text, original, len(vocabulary)))
    findings.symptoms.extend(_kind_symptoms(vocabulary, original))
    _compare_texts(findings, original, chunks, lambda text: _in_llama_cpp(vocabulary, text), best)
    findings.settings.extend(gguf_special_symptoms(vocabulary, metadata, original))
    return findings


def check_folder_tokenizer(
    folder: Path, original: OriginalTokenizer, chunks: Iterable[Sequence[int]]
) -> TokenizerFindings:
    """Compares the tokenizer of a folder, as transformers loads it, with the original's.

    Raises:
        InputError: the folder has no usable tokenizer.
    """
    tokenizer: Any = load_tokenizer(folder)
    findings = TokenizerFindings()

    def text(token: int) -> str | None:
        found: str | None = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
        return found

    findings.symptoms.extend(_token_symptoms(text, original, max(len(tokenizer), len(original))))
    found_added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items()}
    for token, entry in original.added.items():
        other = tokenizer.added_tokens_decoder.get(token)
        flags = ("special", "lstrip", "rstrip", "normalized", "single_word")
        if other is not None and any(getattr(other, flag) != getattr(entry, flag) for flag in flags):
            findings.symptoms.append(f"tokenizer: token {token} {str(entry)!r} is recognised by other rules")
        if token not in found_added:
            findings.symptoms.append(f"tokenizer: token {token} {str(entry)!r} is no added token any more")
    _compare_texts(
        findings, original, chunks, lambda value: tokenizer.encode(value, add_special_tokens=False, verbose=False), None
    )
    findings.symptoms.extend(_decoding_symptoms(tokenizer, original))
    findings.settings.extend(_length_symptoms(folder, original))
    findings.settings.extend(folder_special_symptoms(tokenizer, original))
    return findings


def _decoding_symptoms(tokenizer: Any, original: OriginalTokenizer) -> Iterator[str]:
    """Compares the texts that tokens are turned back into."""
    for text in AWKWARD_TEXTS:
        tokens = original.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        found, wanted = (one.decode(tokens) for one in (tokenizer, original.tokenizer))
        if found != wanted:
            yield (
                f"tokenizer: the tokens of {text[:_TEXT_SHOWN]!r} are turned back into {found[:_TEXT_SHOWN]!r}, by the "
                f"original into {wanted[:_TEXT_SHOWN]!r}"
            )
            return


def _length_symptoms(folder: Path, original: OriginalTokenizer) -> Iterator[str]:
    """Finds truncation and padding in ``tokenizer.json``, which the library applies to every text unasked."""
    paths = [place / "tokenizer.json" for place in (folder, original.folder)]
    if not all(path.is_file() for path in paths):
        return
    found, wanted = map(read_tokenizer_json, paths)
    for name in ("truncation", "padding"):
        one, other = getattr(found, name), getattr(wanted, name)
        if one is not None and one != other:
            yield f"tokenizer.json: {name} is {one}, the original's {other}"


def _token_symptoms(text: Callable[[int], str | None], original: OriginalTokenizer, n_tokens: int) -> list[str]:
    """Finds tokens with another text; converters write the sign for a space as a space in added tokens."""

    def plain(token: int) -> str | None:
        found = text(token)
        return None if found is None else found.replace("\u2581", " ")

    wrong = [
        token
        for token in range(max(n_tokens, len(original)))
        if plain(token) != (None if (own := original.text(token)) is None else own.replace("\u2581", " "))
    ]
    if not wrong:
        return []
    named = ", ".join(f"token {token} is {text(token)!r}, not {original.text(token)!r}" for token in wrong[:_SHOWN])
    return [f"tokenizer: {_more(named, len(wrong))}"]


def _kind_symptoms(vocabulary: GgufVocabulary, original: OriginalTokenizer) -> list[str]:
    """Finds tokens of another kind: those that the original recognises in text, bytes, and ordinary ones."""
    kinds = {token: vocabulary.attributes(token) for token in range(min(len(vocabulary), len(original)))}
    wrong = [token for token, kind in kinds.items() if not kind & _right_kinds(token, original)]
    if not wrong:
        return []
    named = [f"token {token} {original.text(token)!r} is {_kind_name(kinds[token])}" for token in wrong[:_SHOWN]]
    return [f"tokenizer: {_more(', '.join(named), len(wrong))}, which it is not in the original"]


def _right_kinds(token: int, original: OriginalTokenizer) -> int:
    """The attributes of llama.cpp of which the token must have one."""
    entry = original.added.get(token)
    if token == original.tokenizer.unk_token_id:
        return int(api.LLAMA_TOKEN_ATTR_UNKNOWN | api.LLAMA_TOKEN_ATTR_CONTROL)
    if entry is not None and entry.special:
        shown = str(entry) in _SHOWN_IN_TEXTS
        return int(api.LLAMA_TOKEN_ATTR_CONTROL | api.LLAMA_TOKEN_ATTR_USER_DEFINED * shown)
    if entry is not None:  # converters take some of them for control tokens by their looks
        return int(api.LLAMA_TOKEN_ATTR_CONTROL | api.LLAMA_TOKEN_ATTR_USER_DEFINED)
    if _is_byte(original.text(token)):
        return int(api.LLAMA_TOKEN_ATTR_BYTE | api.LLAMA_TOKEN_ATTR_NORMAL * (not original.has_bytes))
    is_special = token in original.tokenizer.all_special_ids
    return int(api.LLAMA_TOKEN_ATTR_NORMAL | api.LLAMA_TOKEN_ATTR_CONTROL * is_special)


def _is_byte(text: str | None) -> bool:
    return text is not None and len(text) == len("<0x00>") and text.startswith("<0x") and text.endswith(">")


def _kind_name(attributes: int) -> str:
    names = {
        api.LLAMA_TOKEN_ATTR_CONTROL: "a control token",
        api.LLAMA_TOKEN_ATTR_USER_DEFINED: "a token of its own",
        api.LLAMA_TOKEN_ATTR_UNKNOWN: "the unknown token",
        api.LLAMA_TOKEN_ATTR_UNUSED: "unused",
        api.LLAMA_TOKEN_ATTR_BYTE: "a byte",
    }
    return next((name for bit, name in names.items() if attributes & bit), "an ordinary token")


def _in_llama_cpp(vocabulary: GgufVocabulary, text: str) -> list[int]:
    return vocabulary.encode(text, add_special_tokens=False, parse_special=True)


def _compare_texts(
    findings: TokenizerFindings,
    original: OriginalTokenizer,
    chunks: Iterable[Sequence[int]],
    encode: Encode,
    best: Callable[[], Encode | None] | None,
) -> None:
    texts = original.cut(chunks)
    different = list(tokenization_differences(texts.__getitem__, encode, texts))
    excuse = best() if best is not None and different else None
    if excuse is not None:
        known = [one for one in different if tuple(excuse(one.text)) == one.found]
        different = [one for one in different if one not in known]
        if known:
            findings.notes.append(
                f"llama.cpp cuts {len(known)} of {len(texts):,} texts differently from the original's tokenizer, "
                f"whatever a file says: {_shown_text(known[0])}"
            )
    if different:
        shown = "; ".join(_described(one, original) for one in different[:_SHOWN])
        findings.symptoms.append(f"tokenizer: {len(different):,} of {len(texts):,} texts become other tokens: {shown}")


def _described(difference: Difference, original: OriginalTokenizer) -> str:
    """Describes a difference: the text, and the tokens where the two lists part."""
    expected, found = difference.expected, difference.found
    place = next(
        (index for index, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]),
        min(len(expected), len(found)),
    )

    def named(tokens: Sequence[int]) -> str:
        part = tokens[place : place + _AROUND]
        return ", ".join(f"{token} {original.text(token)!r}" for token in part) or "nothing more"

    return f"{_shown_text(difference)} gives {named(found)} for {named(expected)}"


def _shown_text(difference: Difference) -> str:
    text = difference.text
    return repr(text if len(text) <= _TEXT_SHOWN else text[:_TEXT_SHOWN] + "...")


def _more(named: str, count: int) -> str:
    return named if count <= _SHOWN else f"{named} and {count - _SHOWN:,} more"
