"""The bytes of a GGUF file before its tensor data: header, metadata and tensor directory.

Version 3, little endian, tensors aligned to 32 bytes (``docs/gguf.md`` of ggml). Rendering to bytes before anything
is written makes the size of a file known exactly without writing it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUF_VERSION, GGUFValueType

from compressors.model.description.family import GgufValue
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType

__all__ = [
    "TensorEntry",
    "Value",
    "aligned",
    "boolean",
    "boolean_array",
    "float32",
    "float32_array",
    "int8_array",
    "int32_array",
    "render_header",
    "render_values",
    "string",
    "string_array",
    "uint32",
    "value_of",
]


_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Value:
    """One metadata value, encoded: type code and payload."""

    encoded: bytes


@dataclass(frozen=True)
class TensorEntry:
    """One line of the tensor directory; the shape is in torch's order."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    n_bytes: int


def uint32(number: int) -> Value:
    """An unsigned 32-bit integer."""
    return Value(struct.pack("<II", GGUFValueType.UINT32, number))


def float32(number: float) -> Value:
    """A single-precision float."""
    return Value(struct.pack("<If", GGUFValueType.FLOAT32, number))


def boolean(flag: bool) -> Value:
    """True or false."""
    return Value(struct.pack("<I?", GGUFValueType.BOOL, flag))


def string(text: str) -> Value:
    """A text in UTF-8."""
    return Value(struct.pack("<I", GGUFValueType.STRING) + _encoded_string(text))


def string_array(texts: Sequence[str]) -> Value:
    """A list of texts."""
    encoded = [text.encode("utf-8") for text in texts]
    lengths = map(_LENGTH.pack, map(len, encoded))
    parts = chain.from_iterable(zip(lengths, encoded, strict=True))
    return Value(_array_prefix(GGUFValueType.STRING, len(texts)) + b"".join(parts))


def int32_array(numbers: Sequence[int]) -> Value:
    """A list of signed 32-bit integers."""
    return Value(_array_prefix(GGUFValueType.INT32, len(numbers)) + struct.pack(f"<{len(numbers)}i", *numbers))


def int8_array(numbers: bytes) -> Value:
    """A list of bytes, read as signed 8-bit integers."""
    return Value(_array_prefix(GGUFValueType.INT8, len(numbers)) + numbers)


def float32_array(numbers: Sequence[float]) -> Value:
    """A list of single-precision floats."""
    return Value(_array_prefix(GGUFValueType.FLOAT32, len(numbers)) + struct.pack(f"<{len(numbers)}f", *numbers))


def boolean_array(flags: Sequence[bool]) -> Value:
    """A list of true and false."""
    return Value(_array_prefix(GGUFValueType.BOOL, len(flags)) + struct.pack(f"<{len(flags)}?", *flags))


def value_of(value: GgufValue) -> Value:
    """The value of a key, in the type that llama.cpp reads it in."""
    if isinstance(value, tuple):
        are_flags = all(isinstance(item, bool) for item in value)
        return boolean_array([bool(item) for item in value]) if are_flags else int32_array(value)
    if isinstance(value, str):
        return string(value)
    if isinstance(value, bool):
        return boolean(value)
    return uint32(value) if isinstance(value, int) else float32(value)


def aligned(n_bytes: int) -> int:
    """The number of bytes up to the next multiple of the alignment."""
    return -(-n_bytes // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def render_values(metadata: Mapping[str, Value]) -> bytes:
    """Keys and values, in the mapping's order."""
    return b"".join(_encoded_string(key) + value.encoded for key, value in metadata.items())


def render_header(n_values: int, values: bytes, tensors: Iterable[TensorEntry]) -> bytes:
    """Everything before the tensor data, padding included; tensor offsets follow from the order of ``tensors``."""
    entries = list(tensors)
    parts = [struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(entries), n_values), values]
    offset = 0
    for entry in entries:
        n_dimensions = len(entry.shape)
        parts.append(_encoded_string(entry.name))
        # ggml counts dimensions from the innermost one
        parts.append(struct.pack(f"<I{n_dimensions}Q", n_dimensions, *reversed(entry.shape)))
        parts.append(struct.pack("<IQ", entry.ggml_type, offset))
        offset += aligned(entry.n_bytes)
    header = b"".join(parts)
    return header.ljust(aligned(len(header)), b"\0")


def _encoded_string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return _LENGTH.pack(len(encoded)) + encoded


def _array_prefix(item_type: GGUFValueType, length: int) -> bytes:
    return struct.pack("<IIQ", GGUFValueType.ARRAY, item_type, length)
