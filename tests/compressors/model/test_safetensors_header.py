"""Headers of safetensors files: all that the library refuses is refused, and files that it reads are read alike."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compressors.model.errors import InputError
from compressors.model.files.safetensors_header import TensorHeader
from compressors.model.files.weight_file import WeightFile

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 64, 2**31, 2**32, 2**63, 2**64, 2**70, -(2**63), 1.0, 0.5, 1e300, "", "F32"),
    *("BF16", "F8_E4M3", "F4", "BOOL", "U64", "F99", "x" * 5000, "\n\x1b[31m", [], [0], [4], [2, 2], [0, 16], [16, 32]),
    *([[4]], [None], ["4"], [4.0], [True], {}, {"F32": None}, {"dtype": "F32"}),
)


def _header() -> dict[str, Any]:
    """Four tensors, one of them empty, and metadata."""
    return {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [16, 19]},
        "none": {"dtype": "BF16", "shape": [0, 7], "data_offsets": [19, 19]},
        "c": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [19, 35]},  # not aligned: the library allows it
    }


def _written(path: Path, header: bytes, n_data: int = 35) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(n_data))
    return path


def _change_a_value(header: dict[str, Any], chance: random.Random) -> None:
    name = chance.choice(list(header))
    key = chance.choice(["dtype", "shape", "data_offsets", "format", "extra"])
    header[name][key] = chance.choice(_VALUES)


def _change_a_number(header: dict[str, Any], chance: random.Random) -> None:
    entry = header[chance.choice(["a", "b", "none", "c"])]
    numbers = entry[chance.choice(["shape", "data_offsets"])]
    numbers[chance.randrange(len(numbers))] = chance.choice([*range(-1, 40), 2**32, 2**64, 1.0, True, None])


def _shift(header: dict[str, Any], chance: random.Random) -> None:
    entry, by = header[chance.choice(["a", "b", "none", "c"])], chance.choice([-16, -3, -1, 1, 3, 16])
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


def _change_an_entry(header: dict[str, Any], chance: random.Random) -> None:
    header[chance.choice([*header, "new", "\ud800", "n" * 5000])] = chance.choice(_VALUES)


def _remove(header: dict[str, Any], chance: random.Random) -> None:
    name = chance.choice(list(header))
    if chance.random() < 0.5:
        del header[name]
    else:
        header[name].pop(chance.choice(list(header[name])))


_CHANGES = (_change_a_value, _change_a_number, _shift, _change_an_entry, _remove)


def _damage_bytes(text: bytes, chance: random.Random) -> bytes:
    """Now and then a byte is another, one is missing, or a piece is there twice."""
    place, width = chance.randrange(len(text)), chance.choice([1, 1, 10, 60])
    kind = chance.randrange(3)
    if kind == 0:
        return text[:place] + bytes([chance.choice(b'\0 "{}[]:,-19eE\\\xff')]) + text[place + 1 :]
    return text[:place] + (text[place : place + width] * 2 if kind == 1 else b"") + text[place + width :]


def _mutated(seed: int) -> tuple[bytes, int]:
    """A header, and the number of bytes that follow it."""
    chance, header = random.Random(seed), _header()
    for _ in range(chance.choice([0, 1, 1, 1, 2])):
        with suppress(TypeError, KeyError, AttributeError, ValueError):  # the first change left nothing to change
            chance.choice(_CHANGES)(header, chance)
    text = json.dumps(header).encode()
    if chance.random() < 0.3:
        text = _damage_bytes(text, chance)
    return text, chance.choice([35] * 8 + [0, 34, 36, 64])


def _library_reads(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    try:
        with safe_open(path, framework="pt") as reader:
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 - no mapping
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError):
        return None


def _we_read(path: Path) -> dict[str, TensorHeader] | None:
    """None if the file was refused, in one short line."""
    try:
        return dict(WeightFile(path).tensors)
    except InputError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 400 + len(str(path))
        assert path.name in message
        return None


def test_whatever_the_library_refuses_is_refused(tmp_path: Path) -> None:
    """Files that both accept have the same names, formats and shapes; and both accept many mutations."""
    n_refused = n_accepted = 0
    for seed in range(1500):
        path = _written(tmp_path / "x.safetensors", *_mutated(seed))
        theirs, ours = _library_reads(path), _we_read(path)
        if theirs is None:
            assert ours is None, path.read_bytes()
            n_refused += 1
        elif ours is not None:
            assert {name: (header.format, list(header.shape)) for name, header in ours.items()} == theirs
            n_accepted += 1
    assert n_refused > 500
    assert n_accepted > 200


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header: header["a"].update(dtype=["F32"]), "the entry of tensor a is damaged"),
        (lambda header: header["a"].update(shape=[2.0, 2]), "the entry of tensor a is damaged"),
        (lambda header: header["a"].update(shape=[True, 4]), "the entry of tensor a is damaged"),
        (lambda header: header["a"].update(shape=[2**32, 2**32]), "the entry of tensor a is damaged"),
        (lambda header: header["c"].update(data_offsets=[18, 34]), "tensor c begins inside another one"),
        (lambda header: header["b"].update(shape=[2], data_offsets=[16, 18]), "tensor none does not begin where"),
        (
            lambda header: header["c"].update(shape=[4, 1], data_offsets=[19, 27]),
            "8 bytes at its end belong to no",
        ),
        (lambda header: header["c"].update(shape=[4, 3], data_offsets=[19, 43]), "tensor c ends after the file does"),
        (lambda header: header.update(__metadata__={"a": 3}), "__metadata__ are no texts"),
        (lambda header: header.update({"n\n" * 5000: 3}), r"tensor n\\nn\\n.*\.\.\..* is damaged"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
    header = _header()
    change(header)
    path = _written(tmp_path / "x.safetensors", json.dumps(header).encode())
    with pytest.raises(InputError, match=said):
        WeightFile(path)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """The library takes one of them."""
    entry = b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    path = _written(tmp_path / "x.safetensors", b"{" + entry + b", " + entry + b"}", 8)
    assert _library_reads(path) is not None
    with pytest.raises(InputError, match="a is there twice"):
        WeightFile(path)


def test_every_format_of_the_library_may_stand_beside_what_is_read(tmp_path: Path) -> None:
    """A mask or a buffer that nobody asks for is no reason to refuse a file."""
    tensors = {
        str(dtype): torch.zeros(8, dtype=torch.uint8).view(dtype)
        for dtype in (torch.bool, torch.int8, torch.int16, torch.uint64, torch.complex64, torch.float8_e5m2)
    }
    save_file(tensors | {"x": torch.arange(4.0)}, tmp_path / "x.safetensors")
    file = WeightFile(tmp_path / "x.safetensors")
    assert torch.equal(file.read("x"), torch.arange(4.0))
    with pytest.raises(InputError, match=r"tensor torch\.int8 has dtype I8; only F64, F32"):
        file.read("torch.int8")
