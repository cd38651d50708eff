"""Tokenizers that stand in a model of SentencePiece alone (``tokenizer.model``), read without its library.

SentencePiece's BPE merges the two neighbours whose union has the highest score. A list of all pairs that make a piece,
in the order of the pieces' scores, says the same to every other program.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError
from compressors.model.files.raw_file import RawFile

__all__ = ["sentencepiece_tokenizer"]

_LARGEST = 64_000_000  # bytes; models of 250,000 pieces have about 5 million
_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def sentencepiece_tokenizer(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the contents of ``tokenizer.json``.

    Args:
        path: the model.
        settings: the contents of ``tokenizer_config.json``.

    Raises:
        InputError: the file is no such model, or of a kind that no tokenizer of the library equals.
    """
    proto = _read(path)
    if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE) or proto.trainer_spec.treat_whitespace_as_suffix:
        raise InputError(
            f"{path} cuts text into whole words or letters, or writes spaces behind words, which tokenizer.json cannot "
            "say; this model cannot be read"
        )
    prefix = bool(settings.get("add_prefix_space", proto.normalizer_spec.add_dummy_prefix))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": piece.piece, **_FLAGS, "special": piece.type != _USER_DEFINED}
            for number, piece in enumerate(proto.pieces)
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(proto.normalizer_spec, prefix=prefix))},
        "pre_tokenizer": None,
        "post_processor": _around_texts(proto, settings),
        "decoder": {"type": "Sequence", "decoders": list(_decoders(prefix=prefix))},
        "model": _unigram(proto) if proto.trainer_spec.model_type == _UNIGRAM else _bpe(proto),
    }


def _read(path: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from transformers.convert_slow_tokenizer import import_protobuf

    file = RawFile(path)
    proto = import_protobuf().ModelProto()
    try:
        if file.size > _LARGEST:
            raise DecodeError(f"it has {file.size:,} bytes")
        proto.ParseFromString(file.start(_LARGEST))
        if not proto.pieces:
            raise DecodeError("it has no pieces")
    except DecodeError as error:
        raise InputError(f"{path} is no model of SentencePiece ({error}); download it again") from None
    return proto


def _normalizers(rules: Any, *, prefix: bool) -> Iterator[dict[str, Any]]:
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode("ascii")
        yield {"type": "Precompiled", "precompiled_charsmap": charsmap}
    if rules.remove_extra_whitespaces:
        yield {"type": "Strip", "strip_left": True, "strip_right": True}
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    if prefix:
        yield {"type": "Prepend", "prepend": _SPACE}
    if rules.escape_whitespaces:
        yield {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


def _decoders(*, prefix: bool) -> Iterator[dict[str, Any]]:
    yield {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    if prefix:
        yield {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _around_texts(proto: Any, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The step that puts begin and end tokens around a text; transformers' class for Llama begins them by default."""
    begins = settings.get("add_bos_token")
    if begins is None:
        begins = str(settings.get("tokenizer_class", "")).startswith(("Llama", "CodeLlama"))
    asked = {
        "bos": (begins, proto.trainer_spec.bos_id),
        "eos": (settings.get("add_eos_token"), proto.trainer_spec.eos_id),
    }
    numbers = {name: number for name, (put, number) in asked.items() if put and 0 <= number < len(proto.pieces)}
    if not numbers:
        return None
    names = {name: proto.pieces[number].piece for name, number in numbers.items()}
    single = [{"Sequence": {"id": "A", "type_id": 0}}]
    parts = {name: [{"SpecialToken": {"id": text, "type_id": 0}}] for name, text in names.items()}
    around = [*parts.get("bos", []), *single, *parts.get("eos", [])]
    return {
        "type": "TemplateProcessing",
        "single": around,
        "pair": [*around, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            text: {"id": text, "ids": [numbers[name]], "tokens": [text]} for name, text in names.items()
        },
    }


def _unigram(proto: Any) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": _unknown(proto),
        "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _bpe(proto: Any) -> dict[str, Any]:
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    return {
        "type": "BPE",
        "unk_token": None if (number := _unknown(proto)) is None else proto.pieces[number].piece,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "vocab": vocabulary,
        "merges": [list(pair) for pair in _merges(proto, vocabulary)],
    }


def _unknown(proto: Any) -> int | None:
    """The number of the piece for what is in no other; None if there is none."""
    return next((number for number, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN), None)


def _merges(proto: Any, vocabulary: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """All pairs of pieces that make a piece, the piece of the highest score first."""
    special = {piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)}
    ordinary = (piece for piece in proto.pieces if piece.piece not in special)
    for piece in sorted(ordinary, key=lambda one: -one.score):
        text = piece.piece
        cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        pairs = [pair for pair in cuts if all(part in vocabulary and part not in special for part in pair)]
        yield from sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
