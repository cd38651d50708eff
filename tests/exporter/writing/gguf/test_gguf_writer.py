"""Files are written whole, with the size that was predicted, the same bytes every time, and run in llama.cpp."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch

from compressors.calibration.statistics import Importance
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, Student
from compressors.quantize import dequantize_rows, fallback_type, kernels
from compressors.quantize.kernels import quantize_rows
from exporter.writing import files, pieces
from exporter.writing.gguf.mixes import MIXES
from exporter.writing.gguf.writer import predict_file_size, write_gguf

_MIXES = ("F32", "BF16", "F16", "Q8_0", "Q5_1", "Q4_K_M", "Q4_0", "IQ4_XS", "MXFP4_MOE", "Q3_K_L", "Q2_0", "TQ1_0")
"""The mixes that are quick to write: no types of codebooks."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Source:
    """Two layers of the fine model."""
    return open_source(toy_checkpoint(tmp_path_factory.mktemp("writer"), n_layers=2))


def _keep(checkpoint: Source, n_experts: int) -> Student:
    """Different experts in each layer, not in order."""
    random = np.random.default_rng(n_experts)
    total = checkpoint.spec.n_experts
    kept = tuple(tuple(random.permutation(total)[:n_experts].tolist()) for _ in range(checkpoint.spec.n_layers))
    return Student(checkpoint, ExpertMap.keeping(total, kept))


def _importance(spec: ModelSpec) -> Importance:
    random = torch.Generator().manual_seed(0)
    importance = {}
    for layer in range(spec.n_layers):
        importance[Role.QUERY, layer] = torch.rand(spec.hidden_size, generator=random)
        inputs = torch.rand(spec.n_experts, spec.hidden_size, generator=random)
        importance[Role.EXPERT_GATE, layer] = importance[Role.EXPERT_UP, layer] = inputs
        importance[Role.EXPERT_DOWN, layer] = torch.rand(spec.n_experts, spec.expert_width, generator=random)
    return importance


@pytest.mark.parametrize("preset", _MIXES)
def test_size_is_predicted_to_the_byte(checkpoint: Source, tmp_path: Path, preset: str) -> None:
    for n_experts in (1, 5, 32):
        student = _keep(checkpoint, n_experts)
        path = tmp_path / f"{n_experts}.gguf"
        written: list[int] = []
        write_gguf(student, preset, path, name="a name", threads=2, progress=written.append)
        predicted = predict_file_size(student.spec, checkpoint, preset, "a name")
        assert path.stat().st_size == sum(written) == predicted


def test_types_of_single_tensors_are_written_and_predicted(checkpoint: Source, tmp_path: Path) -> None:
    student = _keep(checkpoint, 5)
    types = {"blk.0.ffn_down_exps.weight": "Q2_0", "blk.1.attn_k.weight": "F16", "token_embd.weight": "Q3_K"}
    path = tmp_path / "x.gguf"
    write_gguf(student, "Q8_0", path, types=types, name="x", threads=2)
    assert path.stat().st_size == predict_file_size(student.spec, checkpoint, "Q8_0", "x", types)
    file = GgufFile(path)
    assert file.metadata["general.file_type"] == 7
    for name, entry in file.tensors.items():
        usual = "F32" if "norm" in name or "gate_inp" in name else "Q8_0"
        assert entry.ggml_type.name == types.get(name, usual)
    embedding = student.tensor(Role.TOKEN_EMBEDDING)
    stored = file.read_rows(file.tensors["token_embd.weight"], 0, len(embedding))
    np.testing.assert_array_equal(stored, quantize_rows(embedding, GGMLQuantizationType.Q3_K, name="x"))


def test_bytes_do_not_depend_on_the_run_or_the_number_of_threads(
    checkpoint: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = _keep(checkpoint, 6)
    importance = _importance(student.spec)
    files = []
    for threads, piece_values, block_values in ((1, 1 << 20, 1 << 17), (2, 1 << 20, 1 << 17), (2, 5000, 1000)):
        monkeypatch.setattr(pieces, "_PIECE_VALUES", piece_values)
        monkeypatch.setattr(kernels, "_BLOCK_VALUES", block_values)
        path = tmp_path / f"{len(files)}.gguf"
        write_gguf(student, "Q4_K", path, importance=importance, name="x", threads=threads)
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]


def test_each_expert_is_quantized_with_its_own_importance(checkpoint: Source, tmp_path: Path) -> None:
    student = _keep(checkpoint, 4)
    importance = _importance(student.spec)
    write_gguf(student, "Q4_K_S", tmp_path / "x.gguf", importance=importance, name="x", threads=2)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    wanted = MIXES["Q4_K_S"].base
    for role, name in ((Role.EXPERT_UP, "ffn_up_exps"), (Role.EXPERT_DOWN, "ffn_down_exps")):
        stored = tensors[f"blk.1.{name}.weight"]
        for expert in range(4):
            values = student.expert(role, 1, expert)
            ggml_type = fallback_type(wanted, values.shape[1])
            expected = quantize_rows(values, ggml_type, importance[role, 1][expert], name=name)
            np.testing.assert_array_equal(stored.data[expert], expected)
            assert (expected != quantize_rows(values, ggml_type, name=name)).any()
            restored = dequantize_rows(stored.data[expert], ggml_type, values.shape[1])
            assert np.abs(restored - values.float().numpy()).max() < 0.1


def test_overlay_is_what_is_written(checkpoint: Source, tmp_path: Path) -> None:
    student = _keep(checkpoint, 3)
    router = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    student = student.with_overlay({student.name(Role.ROUTER, 1): router})
    write_gguf(student, "Q4_0", tmp_path / "x.gguf", name="x", threads=1)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    np.testing.assert_array_equal(tensors["blk.1.ffn_gate_inp.weight"].data, router.numpy())


def test_a_failure_leaves_the_old_file_and_nothing_else(checkpoint: Source, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("old", encoding="ascii")
    student = _keep(checkpoint, 3)
    name = student.name(Role.EXPERT_DOWN, 1, 2)
    damaged = student.expert(Role.EXPERT_DOWN, 1, 2).float()
    damaged[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"experts\.2\.down_proj\.weight: value \[3, 4\] is nan"):
        write_gguf(student.with_overlay({name: damaged}), "Q8_0", path, name="x", threads=2)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]
    assert path.read_text(encoding="ascii") == "old"


def test_what_cannot_be_written_is_said_first(
    checkpoint: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = _keep(checkpoint, 3)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        write_gguf(student, "Q8_0", tmp_path / "nowhere" / "x.gguf", name="x", threads=1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="only 1000 are free"):
        write_gguf(student, "Q8_0", tmp_path / "x.gguf", name="x", threads=1)


def test_stock_llama_cpp_python_generates_text(family_folder: Path, tmp_path: Path) -> None:
    write_gguf(Student.teacher(open_source(family_folder)), "F32", tmp_path / "x.gguf", name="x", threads=2)
    llama = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=64, n_threads=2, verbose=False)
    answer = llama("The history of", max_tokens=12, temperature=0.0)
    llama.close()
    assert len(answer["choices"][0]["text"]) > 10
