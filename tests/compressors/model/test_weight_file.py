"""Plain reads of safetensors files: the library's values, and every kind of damage by name."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from compressors.model.errors import InputError
from compressors.model.files.raw_file import bytes_read
from compressors.model.files.weight_file import StoredTensors, WeightFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "matrix": torch.randn(6, 4, generator=generator).to(torch.bfloat16),
        "wide": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def _written(header: object, path: Path, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_what_is_read_is_counted_as_often_as_it_is_read(path: Path) -> None:
    before, stored = bytes_read([path]), StoredTensors(path)
    for name in ("matrix", "wide", "matrix"):
        stored[name]
    assert bytes_read([path, path.with_name("never read")]) - before == 2 * 6 * 4 * 2 + 3 * 5 * 8


def test_values_are_those_that_were_saved(path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    stored = StoredTensors(path)
    assert set(stored) == {"matrix", "wide", "scalar", "empty"}
    assert torch.equal(stored["matrix"], torch.randn(6, 4, generator=generator).to(torch.bfloat16))
    assert torch.equal(stored["wide"], torch.randn(3, 5, generator=generator, dtype=torch.float64))
    assert stored["scalar"].item() == 7
    assert stored["empty"].shape == (0, 4)
    assert len(stored) == 4
    assert "other" not in stored


def test_parts_are_read_into_memory_of_any_dtype(path: Path) -> None:
    file = WeightFile(path)
    whole = file.read("matrix")
    out = torch.empty(2, 4)
    file.read_into("matrix", out, first=12)
    assert torch.equal(out, whole[3:5].float())
    buffer = torch.zeros(4, 2, 4, dtype=torch.bfloat16)
    file.read_into("matrix", buffer[2], first=4)
    assert torch.equal(buffer[2], whole[1:3])
    assert not buffer[[0, 1, 3]].any()


def test_reading_leaves_nothing_resident_but_the_tensor(tmp_path: Path) -> None:
    """A mapped file would: 200 MB of pages that were looked at."""
    n_values = 50_000_000
    big = tmp_path / "big.safetensors"
    header = {"x": {"dtype": "F32", "shape": [n_values], "data_offsets": [0, 4 * n_values]}}
    _written(header, big)
    with big.open("r+b") as stream:
        stream.truncate(big.stat().st_size + 4 * n_values)
    file, out = WeightFile(big), torch.empty(1_000_000)
    before = psutil.Process().memory_info().rss
    for first in range(0, n_values, len(out)):
        file.read_into("x", out, first)
    assert psutil.Process().memory_info().rss - before < 20_000_000


def test_the_header_s_digest_is_that_of_its_bytes(path: Path) -> None:
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    assert WeightFile(path).header_sha256 == hashlib.sha256(content[:length]).hexdigest()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "tensor x is damaged"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}, "tensor x is damaged"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, "tensor x ends after"),
        ({"dtype": "F32", "shape": ["a"], "data_offsets": [0, 8]}, "tensor x is damaged"),
        ({"dtype": "F8_E3M4", "shape": [8], "data_offsets": [0, 8]}, "tensor x has dtype F8_E3M4"),
        ({}, "tensor x is damaged"),
        (3, "tensor x is damaged"),
    ],
)
def test_a_damaged_entry_is_named(tmp_path: Path, entry: object, said: str) -> None:
    file = _written({"x": entry}, tmp_path / "damaged.safetensors", b"12345678")
    with pytest.raises(InputError, match=rf"damaged\.safetensors.*{said}"):
        WeightFile(file)


@pytest.mark.parametrize(
    "content", [b"", b"\1\0\0", b"\xff" * 8, struct.pack("<Q", 2) + b"[]", b"\4\0\0\0\0\0\0\0nope"]
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        WeightFile(tmp_path / "x.safetensors")


def test_a_change_after_opening_is_named_with_figures(path: Path) -> None:
    file, size = WeightFile(path), path.stat().st_size
    with path.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(InputError, match=rf"tensor matrix .*had {size} bytes and now has {size + 4}"):
        file.read("matrix")


def test_rewriting_in_place_is_noticed_by_its_time(path: Path) -> None:
    file = WeightFile(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match=r"time of modification.*Put the original back"):
        file.read("wide")
