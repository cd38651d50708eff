"""Files that are cut as llama-gguf-split cuts them: the same tensors and metadata, and llama.cpp loads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader

from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.gguf.sharding import shard_gguf
from exporter.writing.gguf.writer import write_gguf
from validate.runtimes.llama_cpp import LlamaCppBackend

_MOST = 4_000_000


@pytest.fixture(scope="module")
def whole(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "toy.gguf"
    write_gguf(Student.teacher(open_source(toy_model)), "Q8_0", path, name="toy", threads=1)
    return path


@pytest.fixture(scope="module")
def parts(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return shard_gguf(whole, tmp_path_factory.mktemp("parts"), _MOST)


def _keys(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def test_parts_are_as_large_as_they_may_be(parts: list[Path]) -> None:
    count = len(parts)
    assert count > 2
    assert [part.name for part in parts] == [f"toy-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    sizes = [part.stat().st_size for part in parts]
    assert max(sizes) <= _MOST
    first_tensors = [GGUFReader(part).tensors[0].n_bytes for part in parts]
    for size, next_tensor in zip(sizes, first_tensors[1:], strict=False):
        assert size + int(next_tensor) > _MOST, "the next tensor has no room there"


def test_the_first_has_the_metadata_and_each_its_number(whole: Path, parts: list[Path]) -> None:
    n_tensors = len(GGUFReader(whole).tensors)
    for number, part in enumerate(parts):
        own = {"split.no": number, "split.count": len(parts), "split.tensors.count": n_tensors}
        assert _keys(part) == (_keys(whole) | own if number == 0 else own)


def test_every_tensor_is_there_once_in_its_order_with_its_bytes(whole: Path, parts: list[Path]) -> None:
    tensors = [tensor for part in parts for tensor in GGUFReader(part).tensors]
    for found, expected in zip(tensors, GGUFReader(whole).tensors, strict=True):
        assert (found.name, found.tensor_type, list(found.shape)) == (
            *(expected.name, expected.tensor_type, list(expected.shape)),
        )
        np.testing.assert_array_equal(found.data, expected.data)
    assert list(GgufFile(parts[0]).tensors) == list(GgufFile(whole).tensors)


def test_llama_cpp_computes_the_same_with_parts(
    whole: Path, parts: list[Path], heldout_tokens: npt.NDArray[np.int64]
) -> None:
    tokens_BT = heldout_tokens[:64].reshape(1, 64)
    logits = [
        next(iter(LlamaCppBackend(path, n_ctx=64, threads=1).run(tokens_BT))).logits_SV for path in (whole, parts[0])
    ]
    np.testing.assert_array_equal(*logits)


def test_what_fits_is_not_cut(whole: Path, tmp_path: Path) -> None:
    assert shard_gguf(whole, tmp_path, whole.stat().st_size) == []
    assert list(tmp_path.iterdir()) == []


def test_a_larger_tensor_has_a_part_of_its_own(whole: Path, tmp_path: Path) -> None:
    parts = shard_gguf(whole, tmp_path, 1)
    assert [len(GGUFReader(part).tensors) for part in parts] == [1] * len(GGUFReader(whole).tensors)
