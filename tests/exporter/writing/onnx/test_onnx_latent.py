"""Latent attention's matrices of heads: each is a weight of the file, with the numbers that GGUF has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.same_blocks import types_of_onnx
from compressors.model.description.roles import Role
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.encodings import onnx_units
from exporter.writing.onnx.layout import plan_tensors
from exporter.writing.onnx.writer import write_onnx
from tests.exporter.calibrated import Calibrated
from tests.families.conftest import logits_of
from validate.files.weight_comparison import compare_weights
from validate.runtimes.onnx import OnnxRuntimeBackend

_SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_UNIT = "layers.1.kv_b_proj"


@pytest.fixture(scope="module")
def student(fine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Student:
    """A small random model whose rows all divide into blocks of 32."""
    path = tmp_path_factory.mktemp("latent") / "latent"
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **_SIZES)).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(fine_folder / name, path / name)
    return Student.teacher(Checkpoint(path))


def test_the_numbers_are_those_of_gguf(student: Student, tmp_path: Path) -> None:
    """Keys along each head's own values, values along the small vector, whose importance counts for them alone."""
    importance = {(Role.KEY_VALUE_B, 1): torch.linspace(0.1, 10, 64)}
    types = types_of_onnx(student.spec, "Q4_0")
    write_gguf(student, "Q4_0", tmp_path / "x.gguf", types=types, importance=importance, name="x", threads=1)
    write_onnx(student, "Q4_0", tmp_path / "onnx", importance=importance, threads=1)
    of_gguf, of_onnx = GgufWeights(tmp_path / "x.gguf", student.spec), OnnxWeights(tmp_path / "onnx", student.spec)
    for tensor, layer in student.spec.written.places:
        if not tensor.is_per_expert:
            found, expected = (weights.tensor(tensor.role, layer) for weights in (of_onnx, of_gguf))
            assert torch.equal(found, expected), (tensor.role, layer)
            assert of_onnx.stored_type(tensor.role, layer) == of_gguf.stored_type(tensor.role, layer)
    assert of_onnx.block_length(Role.KEY_VALUE_B, 1) is of_gguf.block_length(Role.KEY_VALUE_B, 1) is None
    assert compare_weights(student, student.as_written(of_onnx), of_onnx.stored_type).damage == ()


@torch.no_grad()
@pytest.mark.parametrize("encoding", ["Q4_0", "4@16"])
def test_the_runtime_computes_with_the_numbers_of_the_file(student: Student, tmp_path: Path, encoding: str) -> None:
    tokens_BT = torch.randint(1, 4096, (1, 48), generator=torch.Generator().manual_seed(5))
    write_onnx(student, "F32", tmp_path, encodings={_UNIT: encoding}, inputs="float32", threads=1)
    written = student.as_written(OnnxWeights(tmp_path, student.spec))
    expected_TV = logits_of(StreamedModel(written), tokens_BT)
    (output,) = OnnxRuntimeBackend(tmp_path, threads=1).run(tokens_BT.numpy())
    assert (torch.from_numpy(output.logits_SV) - expected_TV[24:47]).abs().max() < 1e-4 * expected_TV.std()


def test_error_feedback_makes_the_values_nearer_and_leaves_the_keys(student: Student, tmp_path: Path) -> None:
    """Of what keys' matrices are multiplied with, calibration knows nothing: their rows run along the queries."""
    tokens_BT = torch.randint(1, 4096, (4, 64), generator=torch.Generator().manual_seed(6))
    calibrated = Calibrated(student, tokens_BT, tmp_path / "inputs")
    for name, feedback in (("plain", None), ("fed", calibrated.feedback())):
        write_onnx(student, "Q4_0", tmp_path / name, feedback=feedback, threads=1)
    plain, fed = (
        OnnxWeights(tmp_path / name, student.spec).tensor(Role.KEY_VALUE_B, 1).unflatten(0, (3, 64))
        for name in ("plain", "fed")
    )
    assert torch.equal(plain[:, :32], fed[:, :32]) and not torch.equal(plain[:, 32:], fed[:, 32:])


def test_there_are_no_scales_to_tune(student: Student, tmp_path: Path) -> None:
    write_onnx(student, "Q4_0", tmp_path, threads=1)
    with pytest.raises(InputError, match="in parts"):
        OnnxWeights(tmp_path, student.spec).tunable(Role.KEY_VALUE_B, 1)


def test_encodings_fit_the_rows_of_both_kinds_of_matrices(student: Student) -> None:
    """Rows of the small vector have 64 values, those along the queries 32."""
    (unit,) = (unit for unit in onnx_units(student.spec) if unit.name == _UNIT)
    assert "4@32" in unit.encodings and "4@64" not in unit.encodings
    layout = plan_tensors(student.spec, "F32", {_UNIT: "Q4_0"})
    parts = layout.parts(Role.KEY_VALUE_B, 1)
    assert [part.shape for part in parts] == [(64, 32)] * 3 + [(32, 64)] * 3
    assert sum(tensor.n_bytes for part in parts for tensor in part.tensors) == unit.encodings["Q4_0"]
    with pytest.raises(UnsupportedError, match="rows of 32 values"):
        plan_tensors(student.spec, "F32", {_UNIT: "4@64"})
