"""The tensor directory of a GGUF file, and its tensors' stored bytes.

The format is version 3, little endian (``docs/gguf.md`` of ggml): counts, metadata, a directory of tensors, and after
padding their data. gguf-py's reader maps the file into memory and makes an array of every token of the vocabulary;
here the single values of the metadata are kept, the arrays with a number for each layer, and all arrays' lengths.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUF_VERSION, GGUFValueType, Keys

from compressors.model.errors import InputError
from compressors.model.files.gguf.ggml import can_dequantize, row_bytes
from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType
from compressors.model.files.gguf.gguf_split import COUNT_KEY, NUMBER_KEY, TENSORS_KEY, split_parts
from compressors.model.files.raw_file import RawFile
from compressors.model.names import shown

__all__ = ["GgufEntry", "GgufFile", "Value"]

Value = int | float | bool | str | tuple[int, ...]

_LAYOUTS: Mapping[int, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class GgufEntry:
    """One tensor."""

    name: str
    shape: tuple[int, ...]  # torch's order
    ggml_type: GGMLQuantizationType
    offset: int  # the place of its first byte in the file
    part: int = 0  # the index of its file, if the model was split

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return row_bytes(self.ggml_type, self.shape[-1])

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor, padding left out."""
        return prod(self.shape[:-1]) * self.row_bytes


class GgufFile:
    """One file, or all parts of a model that was split; opening reads the headers alone.

    Attributes:
        tensors: the tensors by name.
        metadata: the single values by key, and arrays with a number for each layer.
        array_lengths: the number of items of each array of the metadata, by key.

    Raises:
        InputError: a file is missing, truncated or not GGUF, or has a tensor of a type that ggml cannot dequantize; or
            the file is a part, but not the first one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        first = _Part(path, 0)
        self._parts = [first]
        self.metadata: Mapping[str, Value] = first.header.values
        self.array_lengths: Mapping[str, int] = first.header.array_lengths
        self.tensors: Mapping[str, GgufEntry] = first.tensors
        if (n_parts := self.metadata.get(COUNT_KEY, 1)) not in (0, 1):
            self._add_parts(n_parts)

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, or all parts in their order."""
        return tuple(part.path for part in self._parts)

    def header_digest(self) -> str:
        """SHA-256 over sizes and headers of all parts; equal for equal tensors and metadata."""
        digest = hashlib.sha256()
        for part in self._parts:
            digest.update(f"{part.file.size} ".encode() + part.file.start(part.header.n_bytes))
        return digest.hexdigest()

    def stored_values(self, prefix: str) -> dict[str, bytes]:
        """The metadata under keys that begin so, as the file has it: the code of its type, and its bytes."""
        first = self._parts[0]
        return {
            key: first.file.start(stop - start, start)
            for key, (start, stop) in first.header.places.items()
            if key.startswith(prefix)
        }

    def array(self, key: str) -> tuple[Any, ...] | None:
        """The items of an array of the metadata, however long it is; None if the file has no such array.

        Raises:
            InputError: it holds arrays, or texts that are not UTF-8.
        """
        if key not in self.array_lengths:
            return None
        try:
            return _items(self.stored_values(key)[key])
        except (ValueError, struct.error) as error:
            raise InputError(f"{self.path}: {key} cannot be read ({error}); write the file again") from None

    def path_of(self, entry: GgufEntry) -> Path:
        """The file that holds a tensor."""
        return self._parts[entry.part].path

    def _add_parts(self, n_parts: Value) -> None:
        """Opens the other parts, as llama.cpp finds them."""
        paths = split_parts(self.path)
        if len(paths) != n_parts or self.path != paths[0]:
            raise InputError(
                f"{self.path} is a part of a model that was split into {n_parts}, and not the first by its name; give "
                "the one whose name ends in -00001-of- and that number, with the others beside it"
            )
        tensors = dict(self.tensors)
        for number, path in enumerate(paths[1:], start=1):
            part = _Part(path, number)
            if part.header.values.get(NUMBER_KEY) != number or part.header.values.get(COUNT_KEY) != n_parts:
                raise InputError(f"{path} is not part {number + 1} of {n_parts} of this model; put the right one there")
            tensors |= part.tensors
            self._parts.append(part)
        expected = self.metadata.get(TENSORS_KEY, len(tensors))
        if len(tensors) != expected or len(tensors) != sum(len(part.tensors) for part in self._parts):
            raise InputError(f"{self.path}: its parts hold {len(tensors)} tensors, but it says {expected}; split again")
        self.tensors = tensors

    def read_rows(self, entry: GgufEntry, first: int, n_rows: int) -> npt.NDArray[np.uint8]:
        """The stored bytes of rows of a tensor, counted through all its leading axes: uint8 [rows, bytes of one].

        Raises:
            InputError: the file was changed or cut off since it was opened.
        """
        stored = np.empty((n_rows, entry.row_bytes), dtype=np.uint8)
        self._parts[entry.part].file.fill(entry.name, stored.reshape(-1).data, entry.offset + first * entry.row_bytes)
        return stored


class _Part:
    """One file's header."""

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        self.file = RawFile(path)
        try:
            with path.open("rb") as stream:
                self.header = _Header(stream, path, number)
                self.tensors = self.header.tensors()
        except (EOFError, ValueError, OverflowError, struct.error, OSError) as error:
            raise InputError(
                f"{path} is truncated or not a GGUF file ({str(error) or 'its header ends too early'}): write it again"
            ) from None
        for entry in self.tensors.values():
            if entry.offset + entry.n_bytes > self.file.size:
                raise InputError(
                    f"{path} is truncated: tensor {shown(entry.name)} ends after the file does; write it again"
                )


class _Header:
    """Reads a header from its beginning to its end."""

    def __init__(self, stream: BinaryIO, path: Path, part: int) -> None:
        self._stream = stream
        self._path = path
        self._part = part
        self.values: dict[str, Value] = {}
        self.array_lengths: dict[str, int] = {}
        self.places: dict[str, tuple[int, int]] = {}  # where each value begins and ends
        self.n_bytes = 0

    def tensors(self) -> dict[str, GgufEntry]:
        magic, version, n_tensors, n_values = self._numbers("<IIQQ")
        if magic != GGUF_MAGIC or version != GGUF_VERSION:
            raise ValueError(f"it does not begin as one of version {GGUF_VERSION} does")
        for _ in range(n_values):
            key = self._text()
            if key in self.values or key in self.array_lengths:
                raise ValueError(f"its metadata has {shown(key)} twice")
            start = self._stream.tell()
            self._read_value(key)
            self.places[key] = start, self._stream.tell()
        entries = [self._entry() for _ in range(n_tensors)]
        self.n_bytes = self._stream.tell()
        alignment = self._alignment()
        data = -(-self.n_bytes // alignment) * alignment
        found: dict[str, GgufEntry] = {}
        expected = data
        for name, shape, ggml_type, offset in entries:
            entry = GgufEntry(name, shape, ggml_type, data + offset, self._part)
            if name in found:
                raise ValueError(f"tensor {shown(name)} is there twice")
            if entry.offset != expected:  # gguf_init_from_file_impl demands it too
                raise ValueError(f"tensor {shown(name)} does not begin where the one before it ends")
            expected += -(-entry.n_bytes // alignment) * alignment
            found[name] = entry
        return found

    def _alignment(self) -> int:
        """The alignment of the data: a power of two, as ``gguf_init_from_file_impl`` in ggml/src/gguf.cpp requires."""
        value = self.values.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
        if type(value) is not int or value < 1 or value & (value - 1):
            raise ValueError(f"its {Keys.General.ALIGNMENT} is {value!r}, which is no power of two")
        return value

    def _entry(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._text()
        (n_dimensions,) = self._numbers("<I")
        if not 1 <= n_dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {shown(name)} has {n_dimensions} dimensions")
        shape = self._numbers(f"<{n_dimensions}Q")[::-1]  # ggml counts dimensions from the innermost one
        type_number, offset = self._numbers("<IQ")
        return name, shape, self._type(name, shape, type_number), offset

    def _type(self, name: str, shape: tuple[int, ...], number: int) -> GGMLQuantizationType:
        known = number in set(GGMLQuantizationType)
        if not known or not can_dequantize(GGMLQuantizationType(number)):
            called = GGMLQuantizationType(number).name if known else f"number {number}"
            raise InputError(
                f"{self._path}: tensor {shown(name)} is of type {called}, which ggml cannot turn into numbers"
            )
        ggml_type = GGMLQuantizationType(number)
        if shape[-1] % BLOCK_SIZES[ggml_type][0]:
            raise ValueError(f"tensor {shown(name)} of shape {list(shape)} cannot be of type {ggml_type.name}")
        return ggml_type

    def _read_value(self, key: str) -> None:
        (kind,) = self._numbers("<I")
        if kind == GGUFValueType.ARRAY:
            kind, n_items = self._numbers("<IQ")
            self.array_lengths[key] = n_items
            if kind in _KINDS_BY_LAYER and n_items <= _MOST_LAYERS and not key.startswith(_TOKENIZER):
                self.values[key] = self._numbers(f"<{n_items}{_layout(kind)[-1]}")
            else:
                self._walk_over_items(kind, n_items)
        elif kind == GGUFValueType.STRING:
            (length,) = self._numbers("<Q")
            if length > _LONGEST_TEXT:  # a whole tokenizer.json
                self._stream.seek(length, 1)
            else:
                self.values[key] = self._bytes(length).decode("utf-8", errors="replace")
        else:
            (self.values[key],) = self._numbers(_layout(kind))

    def _walk_over_items(self, kind: int, n_items: int) -> None:
        if kind == GGUFValueType.STRING:
            for _ in range(n_items):
                (length,) = self._numbers("<Q")
                self._stream.seek(length, 1)
        else:
            self._stream.seek(struct.calcsize(_layout(kind)) * n_items, 1)

    def _text(self) -> str:
        (length,) = self._numbers("<Q")
        return self._bytes(length).decode("utf-8")

    def _numbers(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))

    def _bytes(self, length: int) -> bytes:
        data = self._stream.read(length) if length <= _LONGEST_TEXT else b""
        if len(data) < length:
            raise EOFError
        return data


def _items(stored: bytes) -> tuple[Any, ...]:
    """The items of an array as it is stored."""
    _, kind, n_items = struct.unpack_from("<IIQ", stored)
    at = struct.calcsize("<IIQ")
    if kind != GGUFValueType.STRING:
        return struct.unpack_from(f"<{n_items}{_layout(kind)[-1]}", stored, at)
    texts = []
    for _ in range(n_items):
        (length,) = struct.unpack_from("<Q", stored, at)
        at += 8
        texts.append(stored[at : at + length].decode("utf-8"))
        at += length
    return tuple(texts)


def _layout(kind: int) -> str:
    """The struct format of a single value of a kind."""
    layout = _LAYOUTS.get(kind)
    if layout is None:
        raise ValueError(f"it has a single value of kind {kind}, which is not known")
    return layout


_KINDS_BY_LAYER = (GGUFValueType.BOOL, GGUFValueType.UINT32, GGUFValueType.INT32)
_MOST_LAYERS = 512  # LLAMA_MAX_LAYERS in src/llama-hparams.h
_TOKENIZER = "tokenizer."  # arrays under such keys have an entry for each token
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS of ggml/include/ggml.h
_LONGEST_TEXT = 1 << 20  # bytes that are read; llama.cpp allows keys of 65,535 bytes and names of tensors of 64
