"""Damaged safetensors files: 8 bytes of header length, a JSON header, the tensors' bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.places import damaged_bytes, edit, something_else
from tests.fuzz.values import NAMES, NUMBERS, VALUES, damaged_json

__all__ = ["damage_weights"]

_Header = dict[str, Any]
_DTYPES = ("F64", "F16", "F32", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "f32", "", None, [], {}, 3)


def damage_weights(rng: random.Random, folder: Path) -> None:
    """Damages one of the folder's weight files."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    kind = rng.random()
    if kind < 0.05:
        something_else(rng, path)
        return
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if kind < 0.25:
        path.write_bytes(damaged_bytes(rng, data, header=8 + length))
        return
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if kind < 0.45:
        text = damaged_json(rng, header)
    else:
        edit(rng, header, _EDITS)
        text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode("utf-8", errors="surrogatepass")
    size = (
        len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1))
    )
    path.write_bytes(size.to_bytes(8, "little") + text + body)


def _entry(rng: random.Random, header: _Header) -> _Header:
    entry: _Header = header[rng.choice([name for name in header if name != "__metadata__"])]
    return entry


def _move(rng: random.Random, header: _Header) -> None:
    """The same length at another place: between two, over another, beyond the end."""
    entry = _entry(rng, header)
    start, end = entry["data_offsets"]
    by = rng.choice((1, -1, 2, 64, -64, end - start, start - end, -start, 10**6, 2**31, 2**63, -(10**6)))
    entry["data_offsets"] = [start + by, end + by]


def _same_place(rng: random.Random, header: _Header) -> None:
    one, other = _entry(rng, header), _entry(rng, header)
    one["data_offsets"] = list(other["data_offsets"])


def _exchange(rng: random.Random, header: _Header) -> None:
    one, other = _entry(rng, header), _entry(rng, header)
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


def _offsets(rng: random.Random, header: _Header) -> None:
    entry = _entry(rng, header)
    start, end = entry["data_offsets"]
    number = rng.choice(NUMBERS)
    entry["data_offsets"] = rng.choice(
        (
            *([end, start], [start], [start, end, end], [], [str(start), str(end)], [float(start), float(end)]),
            *([start, number], [number, end], [number, number], [start, start], [None, end], {"start": start}, None),
            *([True, end], [start + 0.5, end + 0.5], [[start], [end]]),
        )
    )


def _shape(rng: random.Random, header: _Header) -> None:
    entry = _entry(rng, header)
    shape = entry["shape"]
    number = rng.choice(NUMBERS)
    entry["shape"] = rng.choice(
        (
            *([number, *shape[1:]], [*shape, number], [*shape, 1], shape[1:], shape[::-1], [], [0], None, "x", {}),
            *([str(length) for length in shape], [float(length) for length in shape], [1] * 5000, [[1]], [True]),
            *([-length for length in shape], [2**32, 2**32], [2**63, 2**63, 0], [length + 0.5 for length in shape]),
        )
    )


def _dtype(rng: random.Random, header: _Header) -> None:
    _entry(rng, header)["dtype"] = rng.choice(_DTYPES)


def _name(rng: random.Random, header: _Header) -> None:
    name = rng.choice([name for name in header if name != "__metadata__"])
    header[rng.choice(NAMES)] = header.pop(name)


def _one_more(rng: random.Random, header: _Header) -> None:
    """A tensor that nobody asked for, over another or of no values."""
    entry = dict(_entry(rng, header))
    if rng.random() < 0.5:
        start = entry["data_offsets"][0]
        entry |= {"shape": [0], "data_offsets": [start, start]}
    header[rng.choice((*NAMES, "lm_head.weight.1"))] = entry


def _metadata(rng: random.Random, header: _Header) -> None:
    header["__metadata__"] = rng.choice((*VALUES, {"format": "tf"}, {"x": 1}, {"x": None}, {"x" * 5000: "y"}))


def _no_entry(rng: random.Random, header: _Header) -> None:
    del header[rng.choice(list(header))]


def _another_entry(rng: random.Random, header: _Header) -> None:
    header[rng.choice(list(header))] = rng.choice(VALUES)


_EDITS: tuple[Callable[[random.Random, _Header], None], ...] = (
    *(_move, _same_place, _exchange, _offsets, _shape, _dtype, _name, _one_more, _metadata, _no_entry, _another_entry),
)
