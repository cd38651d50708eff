"""Routers, norms and block scales put into finished files: their bytes change and no others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.files.weight_file import StoredTensors
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from compressors.model.sources.weights import WrittenWeights
from exporter.writing import files
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from exporter.writing.tuning import keep_values, rewrite
from tests.gguf_copies import copy_gguf

_SCALES = {
    "Q4_K": (144, slice(0, 4)),
    "Q5_K": (176, slice(0, 4)),
    "Q5_0": (22, slice(0, 2)),
    "Q6_K": (210, slice(208, 210)),
    "Q8_0": (34, slice(0, 2)),
}
_ROUTER, _NORM = "blk.1.ffn_gate_inp.weight", "output_norm.weight"


@pytest.fixture(params=["fine", "coarse"])
def student(request: pytest.FixtureRequest, tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> Student:
    """Two layers of a trained model with four of its experts."""
    source = open_source(toy_checkpoint(tmp_path, n_layers=2, model=request.param))
    return Student(source, ExpertMap.keeping(source.spec.n_experts, [[5, 0, 3, 6], [1, 7, 2, 4]]))


def _write(container: str, student: Student, folder: Path) -> Path:
    """The container's file that holds weights."""
    folder.mkdir()
    if container == "gguf":
        write_gguf(student, "Q4_K", folder / "x.gguf", name="x", threads=1)
        return folder / "x.gguf"
    write_onnx(student, "Q4_0", folder, threads=1)
    return folder / "model.onnx.data"


def _open(file: Path, student: Student) -> WrittenWeights:
    if file.suffix == ".gguf":
        return GgufWeights(file, student.spec)
    return OnnxWeights(file.parent, student.spec)


def _others(values: StoredTensors) -> dict[str, torch.Tensor]:
    """Other values for everything that a file can take others of."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (tensor * (0.5 + torch.rand(tensor.shape, generator=generator))).to(tensor.dtype)
        for name, tensor in values.items()
    }


def _units(student: Student) -> Iterator[tuple[Role, int | None, int | None]]:
    for tensor, layer in student.spec.written.places:
        for expert in range(4) if tensor.is_per_expert else [None]:
            yield tensor.role, layer, expert


def _numbers(weights: WrittenWeights, student: Student) -> dict[tuple[Role, int | None, int | None], torch.Tensor]:
    written, found = student.as_written(weights), {}
    for role, layer, expert in _units(student):
        if expert is None:
            found[role, layer, expert] = written.tensor(role, layer)
        else:
            assert layer is not None
            found[role, layer, expert] = written.expert(role, layer, expert)
    return found


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_the_file_holds_what_was_judged(container: str, student: Student, tmp_path: Path) -> None:
    """Weights with other values, the file with them written into it, and each block times its factor are the same."""
    file = _write(container, student, tmp_path / "x")
    before, weights = file.read_bytes(), _open(file, student)
    keep_values(weights, student.spec, tmp_path / "kept.safetensors")
    kept = StoredTensors(tmp_path / "kept.safetensors")
    generator = torch.Generator().manual_seed(0)
    # one or two, so that no product is rounded, though the smallest scales are subnormal
    factors = {
        name: 2.0 ** torch.randint(0, 2, tensor.shape[:2], generator=generator)
        for name, tensor in kept.items()
        if tensor.dtype == torch.float16
    }
    assert len(factors) == 2 * 7, "attention and experts of two layers"
    changed = {name: (kept[name] * factor[..., None]).half() for name, factor in factors.items()}
    original, judged = _numbers(weights, student), _numbers(weights.with_values(changed), student)
    for (role, layer, expert), values in original.items():
        name = student.spec.tensor(role, layer).gguf.name.format(layer=layer)
        if name in factors:
            factor = factors[name]
            if expert is not None:
                factor = factor.unflatten(0, (4, -1))[expert]
            values = values * factor.repeat_interleave(values.shape[1] // factor.shape[1], dim=1)
        assert torch.equal(judged[role, layer, expert], values), (role, layer, expert)
    rewrite(weights, changed)
    written = _numbers(_open(file, student), student)
    assert all(torch.equal(written[unit], values) for unit, values in judged.items())
    rewrite(_open(file, student), kept)
    assert file.read_bytes() == before


class _CountedReads(dict[str, torch.Tensor]):
    """Values that count how often each is read."""

    def __init__(self, values: StoredTensors) -> None:
        super().__init__(values)
        self.counts: Counter[str] = Counter()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.counts[name] += 1
        return super().__getitem__(name)


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_all_experts_of_a_layer_read_its_values_once(container: str, student: Student, tmp_path: Path) -> None:
    """Expert after expert, as layers are read."""
    weights = _open(_write(container, student, tmp_path / "x"), student)
    keep_values(weights, student.spec, tmp_path / "kept.safetensors")
    values = _CountedReads(StoredTensors(tmp_path / "kept.safetensors"))
    written = student.as_written(weights.with_values(values))
    values.counts.clear()
    of_experts = student.spec.layers[1].expert_tensors
    for expert in range(4):
        for tensor in of_experts:
            written.expert(tensor.role, 1, expert)
    assert values.counts == dict.fromkeys((tensor.gguf.name.format(layer=1) for tensor in of_experts), 1)


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_routers_and_norms_are_what_they_would_be_had_the_file_been_written_with_them(
    container: str, student: Student, tmp_path: Path
) -> None:
    file = _write(container, student, tmp_path / "before")
    router, norm = torch.randn(4, student.spec.hidden_size), torch.rand(student.spec.hidden_size)
    overlay = {student.name(Role.ROUTER, 1): router, student.name(Role.FINAL_NORM): norm}
    expected = _write(container, student.with_overlay(overlay), tmp_path / "expected").read_bytes()
    rewrite(_open(file, student), {_ROUTER: router, _NORM: norm})
    assert file.read_bytes() == expected
    rewrite(_open(file, student), {_ROUTER: router, _NORM: norm})  # repeated, it changes nothing
    assert file.read_bytes() == expected


def test_only_scales_and_float_tensors_change(student: Student, tmp_path: Path) -> None:
    """gguf's own reader shows it: only d changes in a block, and dmin where there is one, at ggml's places."""
    file = _write("gguf", student, tmp_path / "x")
    before = {tensor.name: tensor.data.copy() for tensor in GGUFReader(file).tensors}
    weights = _open(file, student)
    keep_values(weights, student.spec, tmp_path / "kept.safetensors")
    others = _others(StoredTensors(tmp_path / "kept.safetensors"))
    rewrite(weights, others)
    for tensor in GGUFReader(file).tensors:
        if tensor.name not in others:
            assert np.array_equal(tensor.data, before[tensor.name])
        elif tensor.tensor_type is not GGMLQuantizationType.F32:
            n_bytes, scales = _SCALES[tensor.tensor_type.name]
            old, new = (data.reshape(-1, n_bytes) for data in (before[tensor.name], tensor.data))
            codes = np.setdiff1d(np.arange(n_bytes), np.arange(n_bytes)[scales])
            assert np.array_equal(old[:, codes], new[:, codes])
            found = np.sort(new[:, scales].copy().view(np.float16), axis=None)
            assert np.array_equal(found, np.sort(others[tensor.name].numpy(), axis=None))


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_an_attempt_that_was_stopped_half_way_is_repeated(
    container: str, student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _write(container, student, tmp_path / "x")
    before, weights, really_write = file.read_bytes(), _open(file, student), os.pwrite
    keep_values(weights, student.spec, tmp_path / "kept.safetensors")
    others = _others(StoredTensors(tmp_path / "kept.safetensors"))
    n_writes = 0

    def fail_after_some_bytes(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal n_writes
        n_writes += 1
        if n_writes == 6:
            raise KeyboardInterrupt
        return really_write(descriptor, data[:1000] if n_writes == 5 else data, offset)

    monkeypatch.setattr(files.os, "pwrite", fail_after_some_bytes)
    with pytest.raises(KeyboardInterrupt):
        rewrite(weights, others)
    stopped = file.read_bytes()
    monkeypatch.undo()
    rewrite(_open(file, student), others)
    assert len({before, stopped, file.read_bytes()}) == 3
    expected = _numbers(_open(file, student).with_values(others), student)
    assert all(map(torch.equal, _numbers(_open(file, student), student).values(), expected.values()))
    rewrite(_open(file, student), StoredTensors(tmp_path / "kept.safetensors"))
    assert file.read_bytes() == before


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_what_does_not_fit_is_refused_before_a_byte_is_written(
    container: str, student: Student, tmp_path: Path
) -> None:
    file = _write(container, student, tmp_path / "x")
    before, weights = file.read_bytes(), _open(file, student)
    router = weights.tunable(Role.ROUTER, 1)
    scales = weights.tunable(Role.EXPERT_UP, 1)
    for name, wrong in (
        (_ROUTER, router[:3]),
        (_ROUTER, router.bfloat16()),
        ("blk.1.ffn_up_exps.weight", scales[1:]),
        ("blk.1.ffn_up_exps.weight", scales.float()),
        ("blk.9.ffn_up_exps.weight", scales),
        ("token_embd.weight", router[0]),
    ):
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            rewrite(weights, {_NORM: weights.tunable(Role.FINAL_NORM, None) + 1, name: wrong})
    assert file.read_bytes() == before


def test_a_quantized_router_is_refused(student: Student, tmp_path: Path) -> None:
    """BF16 in the place of F32, as another tool may write it."""
    written = _write("gguf", student, tmp_path / "x")
    file = written.with_name("other.gguf")
    values = next(tensor.data for tensor in GGUFReader(written).tensors if tensor.name == _ROUTER)
    rounded = (values.view(np.uint32) >> 16).astype(np.uint16)
    copy_gguf(written, file, {}, tensors={_ROUTER: (rounded.view(np.uint8), GGMLQuantizationType.BF16)})
    data = file.read_bytes()
    with pytest.raises(InputError, match=r"blk\.1\.ffn_gate_inp\.weight is stored as BF16; it must be F32"):
        rewrite(_open(file, student), {_ROUTER: torch.randn(4, student.spec.hidden_size)})
    assert file.read_bytes() == data


def test_a_file_that_was_published_keeps_what_it_has(student: Student, tmp_path: Path) -> None:
    """Output folders hold hard links to the stages' files."""
    file = _write("gguf", student, tmp_path / "x")
    published, before = tmp_path / "published.gguf", file.read_bytes()
    os.link(file, published)
    router = torch.randn(4, student.spec.hidden_size)
    rewrite(_open(file, student), {_ROUTER: router})
    assert published.read_bytes() == before
    assert torch.equal(_open(file, student).tensor(Role.ROUTER, 1), router)
