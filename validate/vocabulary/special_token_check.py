"""Checks that a file begins, ends and pads texts as the original does, and has its chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compressors.model.sources.gguf_settings import MetadataValue
from validate.vocabulary.original_tokenizer import OriginalTokenizer
from validate.vocabulary.vocabulary import GgufVocabulary

__all__ = ["folder_special_symptoms", "gguf_special_symptoms"]

_ALWAYS_BEGINS = ("gemma4",)  # llama.cpp's models of tokenizers that put BOS before a text, whatever a file says
_SHOWN = 3  # tokens that a sentence names
_TEMPLATE_SHOWN = 40  # characters
_ENDS_BY_NAME = ("end", "eo", "</s", "return", "call", "turn")  # parts of the texts of tokens that end something
_FURTHER = {"unknown": "unk", "mask": "mask", "seperator": "sep"}  # keys as llama.cpp spells them


def gguf_special_symptoms(
    vocabulary: GgufVocabulary, metadata: Mapping[str, MetadataValue], original: OriginalTokenizer
) -> list[str]:
    """Lists the special tokens of a GGUF file that llama.cpp treats unlike the original."""
    return [
        *_begin_symptoms(vocabulary, metadata, original),
        *_end_symptoms(vocabulary, metadata, original),
        *_padding_symptoms(metadata, original),
        *_template_symptoms(_gguf_templates(metadata), original),
    ]


def folder_special_symptoms(tokenizer: Any, original: OriginalTokenizer) -> list[str]:
    """Does the same for a folder's tokenizer, an object of transformers."""
    symptoms = []
    for name in ("bos", "eos", "pad", "unk", "sep", "mask"):
        found, wanted = (getattr(one, f"{name}_token_id") for one in (tokenizer, original.tokenizer))
        if found != wanted:
            symptoms.append(f"tokenizer: the {name} token is {found}, the original's {wanted}")
    if tokenizer.encode("a") != original.tokenizer.encode("a"):
        symptoms.append("tokenizer: it puts other tokens before or behind a text than the original's")
    length, wanted_length = tokenizer.model_max_length, original.tokenizer.model_max_length
    if length != wanted_length:
        symptoms.append(f"tokenizer: model_max_length is {length}, the original's {wanted_length}")
    return [*symptoms, *_template_symptoms(_by_name(tokenizer.chat_template), original)]


def _begin_symptoms(
    vocabulary: GgufVocabulary, metadata: Mapping[str, MetadataValue], original: OriginalTokenizer
) -> Iterator[str]:
    before, _ = original.around()
    allowed = {*before, original.special.bos, original.tokenizer.bos_token_id} - {None}
    found = vocabulary.begin_token
    if allowed and found not in allowed and len(before) < 2:  # of several tokens none is begin
        yield f"tokenizer: the begin token in llama.cpp is {found}, the original's {_listed(allowed)}"
    if metadata.get("tokenizer.ggml.model") in _ALWAYS_BEGINS:
        return
    if vocabulary.adds_begin != (len(before) == 1):  # it cannot put several: a difference that is known in advance
        does, should = ("puts a", "does not") if vocabulary.adds_begin else ("puts no", "does")
        yield f"tokenizer: llama.cpp {does} begin token before a text; the original {should}"


def _end_symptoms(
    vocabulary: GgufVocabulary, metadata: Mapping[str, MetadataValue], original: OriginalTokenizer
) -> Iterator[str]:
    """Checks that every end token of the original ends a text in llama.cpp, and that no token of texts does."""
    _, behind = original.around()
    if vocabulary.adds_end != (len(behind) == 1 and behind[0] in original.special.ends):  # it puts no other token
        does, should = ("puts an", "does not") if vocabulary.adds_end else ("puts no", "does")
        yield f"tokenizer: llama.cpp {does} end token behind a text; the original {should}"
    right, found = original.special.ends, vocabulary.end_token
    if right and found not in right:
        yield f"tokenizer: the end token in llama.cpp is {found}, the original's {_listed(set(right))}"
    ends = vocabulary.end_tokens
    missing = [token for token in right if token not in ends]
    if missing:
        yield f"tokenizer: {_tokens(missing, original)} ends a text of the original, and not in llama.cpp"
    allowed = {*original.added, *right}
    ordinary = [token for token in sorted(ends) if token not in allowed and original.text(token) is not None]
    if ordinary:
        yield f"tokenizer: {_tokens(ordinary, original)}, which occurs in texts, ends them in llama.cpp"
    for key in ("eot_token_id", "eom_token_id"):
        token = metadata.get(f"tokenizer.ggml.{key}")
        text = (original.text(token) or "") if isinstance(token, int) else ""
        if token is not None and token not in right and not any(part in text.lower() for part in _ENDS_BY_NAME):
            yield f"tokenizer: {key} is {token} {text!r}, which ends no text of the original"


def _padding_symptoms(metadata: Mapping[str, MetadataValue], original: OriginalTokenizer) -> Iterator[str]:
    """Checks padding, and tokens that llama.cpp only reports; one that the original lacks may be any special one."""
    allowed: dict[str, set[Any]] = {"padding": {original.tokenizer.pad_token_id, original.special.pad} - {None}}
    for key, name in _FURTHER.items():
        allowed[key] = {getattr(original.tokenizer, f"{name}_token_id")} - {None}
    for key, right in allowed.items():
        found = metadata.get(f"tokenizer.ggml.{key}_token_id")
        is_right = found in right if right else found is None or found in original.added
        if not is_right:
            shown = "absent" if found is None else found
            yield f"tokenizer: the {key} token is {shown}, the original's {_listed(right)}"


def _by_name(templates: Any) -> Mapping[str, str]:
    """Returns chat templates by name; transformers holds none, one, or several by name."""
    if templates is None:
        return {}
    return templates if isinstance(templates, dict) else {"default": templates}


def _gguf_templates(metadata: Mapping[str, MetadataValue]) -> Mapping[str, str]:
    key = "tokenizer.chat_template"
    found = {name: str(value) for name, value in metadata.items() if name == key or name.startswith(f"{key}.")}
    return {name.removeprefix(key).removeprefix(".") or "default": text for name, text in found.items()}


def _template_symptoms(found: Mapping[str, str], original: OriginalTokenizer) -> Iterator[str]:
    wanted = _by_name(original.tokenizer.chat_template)
    for name in sorted(found.keys() | wanted.keys()):
        called = "chat template" if name == "default" else f"chat template {name!r}"
        if name not in wanted:
            yield f"tokenizer: it has a {called}, the original none"
        elif name not in found:
            yield f"tokenizer: the original's {called} is missing"
        elif found[name] != wanted[name]:
            pairs = enumerate(zip(found[name], wanted[name], strict=False))
            shorter = min(len(found[name]), len(wanted[name]))
            place = next((index for index, pair in pairs if pair[0] != pair[1]), shorter)
            part = found[name][place : place + _TEMPLATE_SHOWN]
            yield f"tokenizer: the {called} is another from character {place} on: {part!r}"


def _tokens(tokens: list[int], original: OriginalTokenizer) -> str:
    named = ", ".join(f"{token} {original.text(token)!r}" for token in tokens[:_SHOWN])
    return f"token {named}" if len(tokens) <= _SHOWN else f"token {named} and {len(tokens) - _SHOWN} more"


def _listed(tokens: set[Any]) -> str:
    return ", ".join(map(str, sorted(tokens))) or "none"
