"""Quantized files of models with gated delta rules or short convolutions: numbers, results, and memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.same_blocks import types_of_onnx
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.encodings import onnx_units
from exporter.writing.onnx.memory import predict_runtime_bytes
from exporter.writing.onnx.writer import write_onnx
from tests.families.checkpoints import write_model
from tests.families.conftest import logits_of
from tests.families.rows import ROWS
from validate.files.weight_comparison import compare_weights
from validate.runtimes.measure import measure_artifact
from validate.runtimes.onnx import OnnxRuntimeBackend

_IN_BLOCKS = {
    "shared_expert_intermediate_size": 64,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "max_position_embeddings": 2048,
}
"""Sizes whose rows all divide into blocks of 32."""


@pytest.fixture(scope="module", params=["lfm2_moe", "qwen3_5_moe_text", "qwen3_next"])
def student(request: pytest.FixtureRequest, fine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Student:
    """A small random model; of the gated delta rule in either spelling of the inputs."""
    path = tmp_path_factory.mktemp("delta") / "delta"
    write_model(request.param, ROWS[request.param], path, fine_folder, **_IN_BLOCKS)
    return Student.teacher(Checkpoint(path))


def test_the_numbers_are_those_of_gguf(student: Student, tmp_path: Path) -> None:
    """Vectors and convolutions are the model's own in both; GGUF has them as llama.cpp computes with them."""
    types = types_of_onnx(student.spec, "Q4_0")
    write_gguf(student, "Q4_0", tmp_path / "x.gguf", types=types, name="x", threads=1)
    write_onnx(student, "Q4_0", tmp_path / "onnx", threads=1)
    of_gguf, of_onnx = GgufWeights(tmp_path / "x.gguf", student.spec), OnnxWeights(tmp_path / "onnx", student.spec)
    for tensor, layer in student.spec.written.places:
        if not tensor.is_per_expert and tensor.is_quantizable:
            found, expected = (weights.tensor(tensor.role, layer) for weights in (of_onnx, of_gguf))
            assert torch.equal(found, expected), (tensor.role, layer)
        elif not tensor.is_per_expert:
            assert torch.equal(of_onnx.tensor(tensor.role, layer), student.tensor(tensor.role, layer).float())
    assert compare_weights(student, student.as_written(of_onnx), of_onnx.stored_type).damage == ()


@torch.no_grad()
@pytest.mark.parametrize("encoding", ["Q4_0", "4@16"])
def test_the_runtime_computes_with_the_numbers_of_the_file(student: Student, tmp_path: Path, encoding: str) -> None:
    """Of all matrices in 4 bits but embedding and head."""
    tokens_BT = torch.randint(1, 4096, (1, 48), generator=torch.Generator().manual_seed(5))
    encodings = {unit.name: encoding for unit in onnx_units(student.spec) if unit.layer is not None}
    write_onnx(student, "F32", tmp_path, encodings=encodings, inputs="float32", threads=1)
    written = student.as_written(OnnxWeights(tmp_path, student.spec))
    expected_TV = logits_of(StreamedModel(written), tokens_BT)
    (output,) = OnnxRuntimeBackend(tmp_path, threads=1).run(tokens_BT.numpy())
    assert (torch.from_numpy(output.logits_SV) - expected_TV[24:47]).abs().max() < 1e-4 * expected_TV.abs().max()


def test_measured_peak_is_within_the_prediction(
    student: Student, tmp_path: Path, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    write_onnx(student, "Q4_0", tmp_path, threads=1)
    for context in (64, 1024):
        prompt = heldout_tokens[:2048]
        cost = measure_artifact("onnx", tmp_path, context=context, kv_type="f32", threads=2, prompt=prompt)
        predicted = sum(predict_runtime_bytes(student.spec, "Q4_0", context, threads=2).values())
        assert 0 < cost.peak_rss_bytes - cost.base_rss_bytes <= predicted
