"""Damaged GGUF files: taken apart, changed in one or two places, and put together again."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.places import damaged_bytes, edit, something_else
from tests.fuzz.values import NAMES, NUMBERS

__all__ = ["Parts", "Tensor", "Value", "damage_gguf", "taken_apart"]

_LAYOUTS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = (6, 12)


@dataclass
class Value:
    """One value of the metadata."""

    kind: int
    value: Any  # of an array: its items' kind, how many it says there are, and the items


@dataclass
class Tensor:
    """One entry of the directory."""

    name: bytes
    dimensions: list[int]
    kind: int
    offset: int


@dataclass
class Parts:
    """A file's parts, each of which may be wrong."""

    magic: bytes = b"GGUF"
    version: int = 3
    values: list[tuple[bytes, Value]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    data: bytes = b""
    n_values: int | None = None  # said, if it is not how many there are
    n_tensors: int | None = None

    def header(self) -> bytes:
        """Everything in front of the data."""
        counts = (self.n_tensors, len(self.tensors)), (self.n_values, len(self.values))
        out = self.magic + struct.pack("<I", self.version & 0xFFFFFFFF)
        out += b"".join(_u64(there if said is None else said) for said, there in counts)
        out += b"".join(_text(key) + _u32(value.kind) + _packed(value) for key, value in self.values)
        for tensor in self.tensors:
            out += _text(tensor.name) + _u32(len(tensor.dimensions))
            out += b"".join(map(_u64, tensor.dimensions)) + _u32(tensor.kind) + _u64(tensor.offset)
        return out

    def file(self, alignment: int = 32) -> bytes:
        """The whole file."""
        header = self.header()
        return header.ljust(-(-len(header) // alignment) * alignment, b"\0") + self.data


def _u32(number: int) -> bytes:
    return struct.pack("<I", number & 0xFFFFFFFF)


def _u64(number: int) -> bytes:
    return struct.pack("<Q", int(number) & 0xFFFFFFFFFFFFFFFF)


def _text(data: bytes) -> bytes:
    return _u64(len(data)) + data


def _number(kind: int, number: float) -> bytes:
    layout = "<" + _LAYOUTS.get(kind, "I")
    if kind in _FLOATS:
        return (
            struct.pack(layout, number) if abs(number) < 1e38 or number != number else struct.pack(layout, number > 0)
        )
    size = struct.calcsize(layout)
    whole = int(number) if abs(number) < float("inf") else 0
    return (whole & (1 << 8 * size) - 1).to_bytes(size, "little")


def _packed(value: Value) -> bytes:
    if value.kind == _ARRAY:
        kind, said, items = value.value
        return (
            _u32(kind)
            + _u64(said)
            + b"".join(_text(item) if kind == _STRING else _number(kind, item) for item in items)
        )
    return _text(value.value) if value.kind == _STRING else _number(value.kind, value.value)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, layout: str) -> Any:
        (number,) = struct.unpack_from("<" + layout, self.data, self.place)
        self.place += struct.calcsize("<" + layout)
        return number

    def text(self) -> bytes:
        length = self.take("Q")
        self.place += length
        return self.data[self.place - length : self.place]

    def value(self) -> Value:
        kind = self.take("I")
        if kind == _STRING:
            return Value(kind, self.text())
        if kind != _ARRAY:
            return Value(kind, self.take(_LAYOUTS[kind]))
        item_kind, length = self.take("I"), self.take("Q")
        items = [self.text() if item_kind == _STRING else self.take(_LAYOUTS[item_kind]) for _ in range(length)]
        return Value(kind, (item_kind, length, items))

    def parts(self) -> Parts:
        self.place = 8
        n_tensors, n_values = self.take("Q"), self.take("Q")
        parts = Parts(values=[(self.text(), self.value()) for _ in range(n_values)])
        for _ in range(n_tensors):
            name = self.text()
            dimensions = [self.take("Q") for _ in range(self.take("I"))]
            parts.tensors.append(Tensor(name, dimensions, self.take("I"), self.take("Q")))
        parts.data = self.data[-(-self.place // 32) * 32 :]
        return parts


def taken_apart(data: bytes) -> Parts:
    """The parts of a whole file."""
    return _Reader(data).parts()


def damage_gguf(rng: random.Random, folder: Path) -> None:
    """Damages the file ``model.gguf``."""
    path = folder / "model.gguf"
    data = path.read_bytes()
    parts = taken_apart(data)
    kind = rng.random()
    if kind < 0.04:
        something_else(rng, path)
    elif kind < 0.3:
        path.write_bytes(damaged_bytes(rng, data, header=len(parts.header())))
    else:
        edit(rng, parts, _EDITS)
        path.write_bytes(parts.file(rng.choice((32, 32, 32, 1, 64))))


def _settings(parts: Parts) -> list[int]:
    """Places of the values that are no arrays: they decide more than the vocabulary does."""
    return [place for place, (_, value) in enumerate(parts.values) if value.kind != _ARRAY] or [0]


def _another_number(rng: random.Random, parts: Parts) -> None:
    numbers = [value for _, value in parts.values if value.kind in _LAYOUTS]
    if numbers:
        value = rng.choice(numbers)
        special = (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 1e-38)
        value.value = rng.choice(special) if value.kind in _FLOATS else rng.choice(NUMBERS)


def _another_kind(rng: random.Random, parts: Parts) -> None:
    place = rng.choice(_settings(parts))
    key, value = parts.values[place]
    kind = rng.choice((*_LAYOUTS, _STRING, _ARRAY, 13, 255, 2**31))
    new: Any = rng.choice(NUMBERS)
    if kind == _STRING:
        new = rng.choice(NAMES).encode("utf-8", errors="surrogatepass")
    elif kind == _ARRAY:
        new = (rng.choice((4, 6, 8, 9, 77)), rng.choice((0, 1, 2**31, 2**60, 2**64 - 1)), [])
    elif kind not in _LAYOUTS:
        new = 0
    elif isinstance(value.value, (int, float)) and rng.random() < 0.5:
        new = value.value
    parts.values[place] = (key, Value(kind, new))


def _another_text(rng: random.Random, parts: Parts) -> None:
    texts = [value for _, value in parts.values if value.kind == _STRING]
    if texts:
        names = (
            *(name.encode("utf-8") for name in NAMES),
            b"\xff\xfe",
            b"llama",
            b"qwen3moe",
            b"mamba",
            b"clip",
            b"a" * 70_000,
        )
        rng.choice(texts).value = rng.choice(names)


def _array(rng: random.Random, parts: Parts) -> None:
    arrays = [value for _, value in parts.values if value.kind == _ARRAY and value.value[2]]
    if not arrays:
        return
    array = rng.choice(arrays)
    kind, said, items = array.value
    changed = list(items)
    place = rng.randrange(len(items))
    changed[place] = items[0] if kind == _STRING else rng.choice(NUMBERS)
    array.value = rng.choice(
        (
            *((kind, 0, []), (kind, said - 1, items[:-1]), (kind, said + 1, [*items, items[0]]), (kind, 2**40, items)),
            *((kind, said + 1, items), (kind, said - 1, items), (kind, 2**64 - 1, items), (kind, said, items[::-1])),
            *((_ARRAY, 1, []), (99, said, []), (kind, said, changed), (kind, 1, items[:1]), (kind, 2**63, items)),
            (kind, said, [items[0]] * len(items)),
        )
    )


def _key(rng: random.Random, parts: Parts) -> None:
    place = rng.randrange(len(parts.values))
    key, value = parts.values[place]
    other = rng.choice((rng.choice(NAMES).encode(), rng.choice(parts.values)[0], key[:-1], b"\xff", b"k" * 70_000))
    parts.values[place] = (other, value)


def _no_value(rng: random.Random, parts: Parts) -> None:
    places = _settings(parts) if rng.random() < 0.7 else range(len(parts.values))
    del parts.values[rng.choice(places)]


def _alignment(rng: random.Random, parts: Parts) -> None:
    kind = rng.choice((4, 4, 4, 5, 6, 7, 10, 12))
    number = rng.choice((*NUMBERS, 8, 16, 33, 4096))
    parts.values.append((b"general.alignment", Value(kind, number)))


def _new_setting(rng: random.Random, parts: Parts) -> None:
    """Adds one of the keys that llama.cpp reads if they are there."""
    architecture = next((value.value for key, value in parts.values if key == b"general.architecture"), b"x")
    names = (
        "expert_group_count",
        "expert_group_used_count",
        "rope.scaling.factor",
        "attention.sliding_window",
        "leading",
    )
    names += ("rope.dimension_count", "expert_weights_scale", "attention.causal", "pooling_type", "expert_shared_count")
    name = str(architecture, "utf-8", "replace").encode() + b"." + rng.choice(names).encode()
    parts.values.append((name, Value(rng.choice((4, 5, 6, 7)), rng.choice(NUMBERS))))


def _split(rng: random.Random, parts: Parts) -> None:
    for name in (b"split.no", b"split.count", b"split.tensors.count"):
        if rng.random() < 0.8:
            parts.values.append((name, Value(rng.choice((2, 2, 4, 5)), rng.choice((0, 1, 2, 3, 65535)))))


def _counts(rng: random.Random, parts: Parts) -> None:
    count = rng.choice(
        (0, 1, 2**20, 2**31, 2**40, 2**60, 2**63, 2**64 - 1, len(parts.values) + 1, len(parts.tensors) - 1)
    )
    if rng.random() < 0.5:
        parts.n_values = count
    else:
        parts.n_tensors = count


def _tensor(rng: random.Random, parts: Parts) -> None:
    tensor = rng.choice(parts.tensors)
    kind = rng.randrange(5)
    if kind == 0:
        names = (*(name.encode() for name in NAMES), rng.choice(parts.tensors).name, b"\xff", tensor.name + b"x")
        tensor.name = rng.choice(names)
    elif kind == 1:
        dimensions = tensor.dimensions
        place = rng.randrange(len(dimensions))
        changed = list(dimensions)
        changed[place] = rng.choice((0, 1, 31, 33, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1, changed[place] + 32))
        tensor.dimensions = rng.choice(
            (*(changed,) * 4, [], dimensions[::-1], [*dimensions, 1], [2**32, 2**32], [1] * 5, [1] * 5000, [0] * 4)
        )
    elif kind == 2:
        tensor.kind = rng.choice((*range(45), 99, 2**31, 2**32 - 1))
    elif kind == 3:
        places = (0, 1, 31, 32, rng.choice(parts.tensors).offset, len(parts.data), 2**31, 2**62, 2**63, 2**64 - 32)
        tensor.offset = rng.choice((*places, tensor.offset + 32, tensor.offset + 1))
    else:
        parts.tensors.remove(tensor)


def _head(rng: random.Random, parts: Parts) -> None:
    if rng.random() < 0.7:
        parts.version = rng.choice((0, 1, 2, 4, 0x03000000, 2**32 - 1))
    else:
        parts.magic = rng.choice((b"FUGG", b"GGML", b"\0\0\0\0", b"GGU"))


def _values_of_weights(rng: random.Random, parts: Parts) -> None:
    """Scales of blocks that are NaN, infinite or anything."""
    data = bytearray(parts.data)
    for _ in range(rng.choice((1, 100))):
        place = rng.randrange(len(data) - 2)
        data[place : place + 2] = rng.choice((b"\x00\x7e", b"\x00\x7c", b"\xff\xff", rng.randbytes(2)))
    parts.data = bytes(data)


_EDITS: tuple[Callable[[random.Random, Parts], None], ...] = (
    *(_another_number,) * 5,
    *(_another_kind, _another_kind, _another_text, _another_text, _array, _array, _array, _key, _no_value, _no_value),
    *(_alignment, _new_setting, _new_setting, _split, _counts, _head, _values_of_weights, *(_tensor,) * 6),
)
