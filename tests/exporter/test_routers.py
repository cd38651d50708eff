"""Routers put into finished files: their bytes change and no others, as if the files had been written with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import InputError
from compressors.model.families import Role
from compressors.model.gguf_weights import GgufWeights
from compressors.model.onnx_weights import OnnxWeights
from compressors.model.student import ExpertMap, Student
from compressors.model.weights import WrittenWeights
from exporter import files
from exporter.gguf.writer import write_gguf
from exporter.onnx.writer import write_onnx
from exporter.routers import rewrite_routers
from tests.gguf_copies import copy_gguf


@pytest.fixture(params=["fine", "coarse"])
def student(request: pytest.FixtureRequest, tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> Student:
    """Two layers of a trained model with four of its experts."""
    source = Checkpoint(toy_checkpoint(tmp_path, n_layers=2, model=request.param))
    return Student(source, ExpertMap.keeping(source.shape.n_experts, [[5, 0, 3, 6], [1, 7, 2, 4]]))


@pytest.fixture
def routers(student: Student) -> dict[int, torch.Tensor]:
    """Others than the student's."""
    generator = torch.Generator().manual_seed(0)
    return {layer: torch.randn(4, student.shape.hidden_size, generator=generator) for layer in range(2)}


def _write(container: str, student: Student, folder: Path) -> Path:
    """The container's file that holds weights."""
    folder.mkdir()
    if container == "gguf":
        write_gguf(student, "Q4_0", folder / "x.gguf", name="x", threads=1)
        return folder / "x.gguf"
    write_onnx(student, "Q4_0", folder, context_length=64, threads=1)
    return folder / "model.onnx.data"


def _open(file: Path, student: Student) -> WrittenWeights:
    if file.suffix == ".gguf":
        return GgufWeights(file, student.shape)
    return OnnxWeights(file.parent, student.shape)


def _taught(student: Student, routers: dict[int, torch.Tensor]) -> Student:
    return student.with_overlay({student.name(Role.ROUTER, layer): router for layer, router in routers.items()})


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_the_file_is_what_it_would_be_had_it_been_written_with_them(
    container: str, student: Student, routers: dict[int, torch.Tensor], tmp_path: Path
) -> None:
    file = _write(container, student, tmp_path / "before")
    expected = _write(container, _taught(student, routers), tmp_path / "expected").read_bytes()
    before = file.read_bytes()
    assert before != expected
    rewrite_routers(_open(file, student), routers)
    assert file.read_bytes() == expected
    rewrite_routers(_open(file, student), routers)  # repeated, it changes nothing
    assert file.read_bytes() == expected
    original = {layer: student.tensor(Role.ROUTER, layer).float() for layer in range(2)}
    rewrite_routers(_open(file, student), original)
    assert file.read_bytes() == before


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_no_other_byte_changes(
    container: str, student: Student, routers: dict[int, torch.Tensor], tmp_path: Path
) -> None:
    file = _write(container, student, tmp_path / "x")
    before, weights = bytearray(file.read_bytes()), _open(file, student)
    places = [weights.router_place(layer) for layer in range(2)]
    rewrite_routers(weights, routers)
    after = bytearray(file.read_bytes())
    assert len(after) == len(before)
    for place, router in zip(places, routers.values(), strict=True):
        where = slice(place.offset, place.offset + 4 * router.numel())
        assert after[where] == router.numpy().tobytes() != before[where]
        after[where] = before[where]
    assert after == before


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_an_attempt_that_was_stopped_half_way_is_repeated(
    container: str,
    student: Student,
    routers: dict[int, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = _write(container, student, tmp_path / "x")
    expected = _write(container, _taught(student, routers), tmp_path / "expected").read_bytes()
    before, really_write = file.read_bytes(), os.pwrite

    def fail_after_some_bytes(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) < 4 * 4 * 256:  # the rest of the first router
            raise KeyboardInterrupt
        return really_write(descriptor, data[:1000], offset)

    monkeypatch.setattr(files.os, "pwrite", fail_after_some_bytes)
    with pytest.raises(KeyboardInterrupt):
        rewrite_routers(_open(file, student), routers)
    assert file.read_bytes() not in (before, expected)
    monkeypatch.undo()
    rewrite_routers(_open(file, student), routers)
    assert file.read_bytes() == expected


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_what_does_not_fit_is_refused_before_a_byte_is_written(
    container: str, student: Student, routers: dict[int, torch.Tensor], tmp_path: Path
) -> None:
    file = _write(container, student, tmp_path / "x")
    before = file.read_bytes()
    for wrong in (routers[1][:3], routers[1].bfloat16(), routers[1].T.contiguous()):
        with pytest.raises(InputError, match=r"float32 router of shape \[4, 256\]"):
            rewrite_routers(_open(file, student), {0: routers[0], 1: wrong})
    assert file.read_bytes() == before


def test_a_quantized_router_is_refused(student: Student, routers: dict[int, torch.Tensor], tmp_path: Path) -> None:
    """BF16 in the place of F32, as another tool may write it."""
    written = _write("gguf", student, tmp_path / "x")
    file, name = written.with_name("other.gguf"), "blk.1.ffn_gate_inp.weight"
    values = next(tensor.data for tensor in GGUFReader(written).tensors if tensor.name == name)
    rounded = (values.view(np.uint32) >> 16).astype(np.uint16)
    copy_gguf(written, file, {}, tensors={name: (rounded.view(np.uint8), GGMLQuantizationType.BF16)})
    data = file.read_bytes()
    with pytest.raises(InputError, match=r"blk\.1\.ffn_gate_inp\.weight is stored as BF16; routers must be F32"):
        rewrite_routers(_open(file, student), routers)
    assert file.read_bytes() == data


def test_a_file_that_was_published_keeps_its_routers(
    student: Student, routers: dict[int, torch.Tensor], tmp_path: Path
) -> None:
    """Output folders hold hard links to the stages' files."""
    file = _write("gguf", student, tmp_path / "x")
    published, before = tmp_path / "published.gguf", file.read_bytes()
    os.link(file, published)
    rewrite_routers(_open(file, student), routers)
    assert published.read_bytes() == before
    assert torch.equal(_open(file, student).tensor(Role.ROUTER, 1), routers[1])
