"""GGUF directories that contradict themselves are refused, and the message names the entry."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from compressors.model.description.family import GgufValue
from compressors.model.errors import InputError
from compressors.model.files.gguf.ggml import can_dequantize
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.gguf.gguf_file import GgufFile
from exporter.writing.gguf.container import (
    float32_array,
    int32_array,
    render_header,
    render_values,
    uint32,
    value_of,
)
from tests.fuzz.gguf_files import Parts, Tensor, Value, taken_apart


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Two tensors of 64 values and some metadata."""
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name in ("one", "two"):
        writer.add_tensor(name, np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _tensor(parts: Parts, **changes: object) -> None:
    for name, value in changes.items():
        setattr(parts.tensors[1], name, value)


def _alignment(kind: int, value: float) -> Callable[[Parts], None]:
    return lambda parts: parts.values.append((b"general.alignment", Value(kind, value)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda parts: _tensor(parts, name=b"one"), "tensor one is there twice"),
        (lambda parts: parts.values.append(parts.values[0]), "its metadata has general.architecture twice"),
        (lambda parts: _tensor(parts, offset=0), "tensor two does not begin where the one before it ends"),
        (lambda parts: _tensor(parts, offset=288), "tensor two does not begin where the one before it ends"),
        (lambda parts: _tensor(parts, offset=2**64 - 32), "tensor two does not begin where"),
        (lambda parts: _tensor(parts, dimensions=[32, 2**40]), "tensor two ends after the file does"),
        (lambda parts: _tensor(parts, dimensions=[32, 2**63]), "tensor two ends after the file does"),
        (lambda parts: _tensor(parts, dimensions=[]), "tensor two has 0 dimensions"),
        (lambda parts: _tensor(parts, dimensions=[1] * 5000), "tensor two has 5000 dimensions"),
        (lambda parts: _tensor(parts, kind=8, dimensions=[33]), "tensor two of shape [33] cannot be of type Q8_0"),
        (lambda parts: _tensor(parts, kind=99), "tensor two is of type number 99"),
        (lambda parts: _tensor(parts, name=b"\x1b[31m" * 99, kind=99), r"tensor \x1b[31m"),
        (lambda parts: setattr(parts, "n_tensors", 2**60), "its header ends too early"),
        (lambda parts: setattr(parts, "n_values", 2**60), "is truncated or not a GGUF file"),
        (lambda parts: setattr(parts, "version", 2), "it does not begin as one of version 3 does"),
        (_alignment(4, 0), "its general.alignment is 0, which is no power of two"),
        (_alignment(4, 33), "its general.alignment is 33"),
        (_alignment(5, -1), "its general.alignment is -1"),
        (_alignment(6, 32.0), "its general.alignment is 32.0"),
    ],
)
def test_what_contradicts_itself_is_named(
    whole: bytes, damage: Callable[[Parts], None], said: str, tmp_path: Path
) -> None:
    parts = taken_apart(whole)
    damage(parts)
    (tmp_path / "x.gguf").write_bytes(parts.file())
    with pytest.raises(InputError) as raised:
        GgufFile(tmp_path / "x.gguf")
    message = str(raised.value)
    assert str(tmp_path / "x.gguf") in message
    assert said in message
    assert message.isprintable()
    assert len(message) < 400


def test_a_file_that_is_put_together_again_is_the_same(whole: bytes, tmp_path: Path) -> None:
    parts = taken_apart(whole)
    assert parts.file() == whole
    assert [tensor.name for tensor in parts.tensors] == [b"one", b"two"]
    assert isinstance(parts.tensors[0], Tensor)


def test_arrays_with_a_number_for_each_layer_are_read(tmp_path: Path) -> None:
    given: dict[str, GgufValue] = {"llama.heads": (8, 0, -1), "llama.recurrent": (True, False), "llama.none": ()}
    arrays = {key: value_of(value) for key, value in given.items()}
    others = {
        "tokenizer.ggml.token_type": int32_array([1, 2]),
        "llama.scores": float32_array([0.5]),
        "llama.long": int32_array(range(513)),
    }
    values = {**arrays, **others, "llama.block_count": uint32(3)}
    (tmp_path / "x.gguf").write_bytes(render_header(len(values), render_values(values), []))
    file = GgufFile(tmp_path / "x.gguf")
    assert file.metadata == {**given, "llama.block_count": 3}
    assert [type(item) for item in file.metadata["llama.recurrent"]] == [bool, bool]
    assert file.array_lengths == {
        "llama.heads": 3, "llama.recurrent": 2, "llama.none": 0,
        "tokenizer.ggml.token_type": 2, "llama.scores": 1, "llama.long": 513,
    }  # fmt: skip
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["llama.heads"].contents() == [8, 0, -1]
    assert fields["llama.heads"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert fields["llama.recurrent"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL]


def test_a_file_that_is_cut_off_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    for length in range(0, len(whole) - 1, 7):
        (tmp_path / "x.gguf").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"x\.gguf is truncated"):
            GgufFile(tmp_path / "x.gguf")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(InputError, match=r"x\.gguf is a named pipe"):
        GgufFile(tmp_path / "x.gguf")


def test_looking_at_a_type_sets_up_no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables that quantizing to the IQ types needs take seconds."""
    monkeypatch.setattr("compressors.model.files.gguf.ggml.ggml_library_for", None)
    assert can_dequantize(GGMLQuantizationType.IQ2_XS)
    assert can_dequantize(GGMLQuantizationType.IQ3_S)
