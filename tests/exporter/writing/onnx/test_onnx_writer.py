"""The two files of an ONNX model: their size is known in advance, their bytes depend only on the student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from compressors.model.description.roles import Role
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.onnx_blocks import from_q4_0, pack
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, Student
from compressors.quantize import GGMLQuantizationType
from compressors.quantize.kernels import quantize_rows
from exporter.writing.onnx.encodings import PRESETS
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE, plan_tensors
from exporter.writing.onnx.writer import predict_size, write_onnx
from tests.altered import altered


@pytest.fixture(params=["fine", "coarse"])
def toy(request: pytest.FixtureRequest, tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> Checkpoint:
    """The first layer of each trained model."""
    return Checkpoint(toy_checkpoint(tmp_path, n_layers=1, model=request.param))


def _pruned(source: Checkpoint, kept: tuple[int, ...]) -> Student:
    return Student(source, ExpertMap.keeping(source.spec.n_experts, (kept,) * source.spec.n_layers))


def _read(folder: Path) -> tuple[bytes, bytes]:
    return (folder / MODEL_FILE).read_bytes(), (folder / DATA_FILE).read_bytes()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("n_experts", [1, 3, 8])
def test_size_is_predicted_to_the_byte(toy: Checkpoint, tmp_path: Path, preset: str, n_experts: int) -> None:
    student = _pruned(toy, tuple(range(n_experts)))
    steps: list[int] = []
    write_onnx(student, preset, tmp_path / "onnx", threads=2, progress=steps.append)
    model, data = _read(tmp_path / "onnx")
    assert predict_size(student.spec, preset) == len(model) + len(data)
    layout = plan_tensors(student.spec, preset)
    assert sum(steps) == sum(tensor.n_bytes for tensor in layout.tensors)


@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_do_not_depend_on_threads(toy: Checkpoint, tmp_path: Path, preset: str) -> None:
    student = _pruned(toy, (5, 0, 3))
    for threads in (1, 2):
        write_onnx(student, preset, tmp_path / str(threads), threads=threads)
    assert _read(tmp_path / "1") == _read(tmp_path / "2")


@pytest.mark.parametrize("preset", PRESETS)
def test_onnx_checker_accepts_the_model(toy: Checkpoint, tmp_path: Path, preset: str) -> None:
    write_onnx(Student.teacher(toy), preset, tmp_path / "onnx", threads=2)
    onnx.checker.check_model(str(tmp_path / "onnx" / MODEL_FILE), full_check=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_tensors_do_not_overlap_and_large_ones_start_on_a_page(toy: Checkpoint, preset: str) -> None:
    layout = plan_tensors(toy.spec, preset)
    end = 0
    for tensor in layout.tensors:
        assert tensor.offset >= end
        assert tensor.offset % (4096 if tensor.n_bytes >= 65536 else 64) == 0
        end = tensor.offset + tensor.n_bytes
    assert end == layout.data_bytes


def test_experts_are_quantized_with_their_own_importance(toy: Checkpoint, tmp_path: Path) -> None:
    """Gate and up rows alternate, and each holds the codes that the GGUF file gets with the same importance."""
    kept = (4, 1)
    student = _pruned(toy, kept)
    generator = torch.Generator().manual_seed(0)
    spec = student.spec
    importance = {
        (role, 0): torch.rand(len(kept), spec.hidden_size, generator=generator) ** 4 + 1e-3
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP)
    }
    write_onnx(student, "Q4_0", tmp_path / "weighted", importance=importance, threads=2)
    weight = plan_tensors(spec, "Q4_0").weight(Role.EXPERT_GATE, 0)
    data = _read(tmp_path / "weighted")[1]
    codes = np.frombuffer(data, np.uint8, weight.codes.n_bytes, weight.codes.offset).reshape(weight.codes.shape)
    for expert, teacher_expert in enumerate(kept):
        for first, role in enumerate((Role.EXPERT_GATE, Role.EXPERT_UP)):
            values = toy.expert(role, 0, teacher_expert)
            rows = quantize_rows(values, GGMLQuantizationType.Q4_0, importance[role, 0][expert], name="expected")
            np.testing.assert_array_equal(codes[expert, first::2], pack(from_q4_0(rows).codes_RN, 4))
    write_onnx(student, "Q4_0", tmp_path / "plain", threads=2)
    assert _read(tmp_path / "plain")[1] != data


def test_tied_head_is_stored_once(toy: Checkpoint, tmp_path: Path) -> None:
    write_onnx(Student.teacher(toy), "Q4_0", tmp_path / "onnx", threads=2)
    model = onnx.load(tmp_path / "onnx" / MODEL_FILE, load_external_data=False)
    offsets = {
        tensor.name: next(entry.value for entry in tensor.external_data if entry.key == "offset")
        for tensor in model.graph.initializer
        if tensor.external_data
    }
    assert offsets["model.embed_tokens.weight.codes"] == offsets["model.embed_tokens.weight.codes.matrix"]


def test_a_weight_that_is_not_finite_leaves_nothing_behind(toy: Checkpoint, tmp_path: Path) -> None:
    name = Student.teacher(toy).name(Role.EXPERT_DOWN, 0, 2)
    damaged = toy.expert(Role.EXPERT_DOWN, 0, 2).clone()
    damaged[3, 7] = float("nan")
    student = Student.teacher(toy).with_overlay({name: damaged})
    folder = tmp_path / "onnx"
    with pytest.raises(InputError, match=r"\[2\] \(expert down\).*nan"):
        write_onnx(student, "Q4_0", folder, threads=2)
    assert list(folder.iterdir()) == []


def test_a_failed_export_leaves_an_earlier_one_as_it_was(toy: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    write_onnx(Student.teacher(toy), "F32", folder, threads=1)
    before = _read(folder)
    damaged = {Student.teacher(toy).name(Role.FINAL_NORM): torch.full((256,), float("inf"))}
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        write_onnx(Student.teacher(toy).with_overlay(damaged), "F32", folder, threads=1)
    assert _read(folder) == before
    assert len(list(folder.iterdir())) == 2


def test_wrong_choices_are_refused_by_name(toy: Checkpoint) -> None:
    with pytest.raises(InputError, match=r"'Q9'.*F32, Q4_0"):
        predict_size(toy.spec, "Q9")
    with pytest.raises(UnsupportedError, match="rows of 100 values"):
        predict_size(altered(toy.spec, expert_width=100), "Q4_0")
