"""A written file read back by role: the numbers are the runtime's, and the model computes the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from benchmarks.same_blocks import types_of_onnx
from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.running.layers import LayerReader, layer_bytes
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE
from exporter.writing.onnx.writer import write_onnx
from tests.altered import altered
from validate.metrics.evaluation import evaluate
from validate.metrics.statistics import perplexity
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.runtimes.torch import TorchBackend

Tokens = npt.NDArray[np.int64]


@pytest.fixture(scope="module", params=["fine", "coarse"])
def student(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]
) -> Student:
    """Two layers of a trained model with four of its experts, others in each layer and not in order."""
    source = open_source(toy_checkpoint(tmp_path_factory.mktemp("written"), n_layers=2, model=request.param))
    return Student(source, ExpertMap.keeping(source.spec.n_experts, [[5, 0, 3, 6], [1, 7, 2, 4]]))


def _by_role(student: Student) -> Iterator[tuple[Role, int | None, int | None]]:
    for tensor, layer in student.spec.written.places:
        is_of_experts = student.spec.tensor(tensor.role, layer).is_per_expert  # of a dense file it is the only one's
        for expert in range(student.spec.n_experts) if is_of_experts else [None]:
            yield tensor.role, layer, expert


def _tensor(student: Student, role: Role, layer: int | None, expert: int | None) -> torch.Tensor:
    if expert is None or layer is None:
        return student.tensor(role, layer)
    return student.expert(role, layer, expert)


def _rotation_order(n_rows: int, head_dim: int) -> list[int]:
    """Row of llama.cpp's interleaved order for each row of transformers' order."""
    half = head_dim // 2
    return [row // head_dim * head_dim + row % head_dim % half * 2 + row % head_dim // half for row in range(n_rows)]


@pytest.mark.parametrize("preset", ["F32", "F16", "Q8_0", "Q5_K_M", "IQ4_XS", "Q4_1", "MXFP4_MOE", "Q2_K", "TQ2_0"])
def test_every_gguf_tensor_is_what_gguf_py_dequantizes(student: Student, tmp_path: Path, preset: str) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(student, preset, path, name="x", threads=1)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    written = student.as_written(GgufWeights(path, student.spec))
    names = {(tensor.role, tensor.layer): tensor.name for tensor in plan_tensors(student.spec, preset)}
    n_checked = 0
    for role, layer, expert in _by_role(student):
        tensor = stored[names[role, layer]]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if expert is not None:
            expected = expected[expert]
        if role in (Role.QUERY, Role.KEY) and student.spec.model_type == "mixtral":
            expected = expected[_rotation_order(len(expected), student.spec.layers[0].mixer.head_dim)]
        found = _tensor(written, role, layer, expert)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), expected, err_msg=f"{role} {layer} {expert}")
        n_checked += 1
    assert n_checked > 2 * 4 * 3


@pytest.mark.parametrize("preset", ["F32", "Q4_0"])
def test_onnx_holds_the_numbers_of_the_gguf_of_the_same_type(student: Student, tmp_path: Path, preset: str) -> None:
    types = types_of_onnx(student.spec, preset)
    write_gguf(student, preset, tmp_path / "x.gguf", types=types, name="x", threads=1)
    write_onnx(student, preset, tmp_path / "onnx", threads=1)
    of_gguf = student.as_written(GgufWeights(tmp_path / "x.gguf", student.spec))
    of_onnx = student.as_written(OnnxWeights(tmp_path / "onnx", student.spec))
    for role, layer, expert in _by_role(student):
        found, expected = (_tensor(written, role, layer, expert) for written in (of_onnx, of_gguf))
        assert torch.equal(found, expected), (role, layer, expert)
        if preset == "F32":
            assert torch.equal(found, _tensor(student, role, layer, expert).float())
    rows = slice(7, 11)
    assert torch.equal(of_onnx.rows(Role.TOKEN_EMBEDDING, None, rows), of_gguf.tensor(Role.TOKEN_EMBEDDING)[rows])
    assert torch.equal(of_gguf.rows(Role.TOKEN_EMBEDDING, None, rows), of_gguf.tensor(Role.TOKEN_EMBEDDING)[rows])
    assert torch.equal(of_gguf.rows(Role.QUERY, 1, rows), of_onnx.rows(Role.QUERY, 1, rows))


def test_layers_are_read_into_float32_and_overlays_come_first(student: Student, tmp_path: Path) -> None:
    write_gguf(student, "Q4_0", tmp_path / "x.gguf", name="x", threads=1)
    router = torch.randn(4, student.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    written = student.as_written(GgufWeights(tmp_path / "x.gguf", student.spec))
    taught = written.with_overlay({student.name(Role.ROUTER, 1): router})
    assert layer_bytes(taught) == 2 * layer_bytes(student)  # the source is bfloat16
    reader = LayerReader(taught, n_resident=0, read_ahead=True, check_finite=True)
    for index, weights in reader.visit([0, 1]):
        gate_up = torch.cat([written.expert(role, index, 3) for role in (Role.EXPERT_GATE, Role.EXPERT_UP)])
        assert weights.gate_up_EFD.dtype == torch.float32
        assert torch.equal(weights.gate_up_EFD[3], gate_up)
        assert torch.equal(weights.others[Role.ROUTER], router if index == 1 else written.tensor(Role.ROUTER, 0))


def test_the_streamed_file_predicts_what_the_runtimes_predict(
    fine_folder: Path, heldout_tokens: Tokens, tmp_path: Path
) -> None:
    """Far more closely than the unquantized student does: what is left is the runtime's own arithmetic."""
    source = open_source(fine_folder)
    student = Student(source, ExpertMap.keeping(source.spec.n_experts, [range(0, 32, 2)] * 6))
    write_gguf(student, "Q4_0", tmp_path / "x.gguf", name="x", threads=1)
    write_onnx(student, "Q4_0", tmp_path / "onnx", threads=1)
    of_gguf = student.as_written(GgufWeights(tmp_path / "x.gguf", student.spec))
    of_onnx = student.as_written(OnnxWeights(tmp_path / "onnx", student.spec))
    runtimes = {
        "gguf": (of_gguf, LlamaCppBackend(tmp_path / "x.gguf", n_ctx=256, threads=1)),
        "onnx": (of_onnx, OnnxRuntimeBackend(tmp_path / "onnx", threads=1)),
    }
    tokens_BT = heldout_tokens[: 4 * 256].reshape(4, 256)
    for name, (written, runtime) in runtimes.items():
        record = LogProbWriter(tmp_path / name, 4 * 127, source.spec.vocab_size)
        in_runtime = evaluate(runtime, tokens_BT, {}, record=record)
        reference = {"runtime": LogProbReader(tmp_path / name)}
        in_torch, unquantized = (evaluate(TorchBackend(it), tokens_BT, reference) for it in (written, student))
        floor, distance = (float(it.against["runtime"].kl_divergence_N.mean()) for it in (in_torch, unquantized))
        assert floor < 0.1 * distance
        measured, same, other = (
            perplexity(it.negative_log_likelihood_N)[0] for it in (in_runtime, in_torch, unquantized)
        )
        assert abs(same / measured - 1) < 0.2 * abs(other / measured - 1)


def test_a_dense_model_is_read_too(student: Student, tmp_path: Path) -> None:
    dense = Student(student.source, ExpertMap.keeping(student.source.spec.n_experts, [[3], [5]]))
    write_gguf(dense, "F32", tmp_path / "x.gguf", name="x", threads=1)
    write_onnx(dense, "Q4_0", tmp_path / "onnx", threads=1)
    of_gguf, of_onnx = GgufWeights(tmp_path / "x.gguf", dense.spec), OnnxWeights(tmp_path / "onnx", dense.spec)
    written = dense.as_written(of_gguf)
    for role, layer, expert in _by_role(dense):
        assert torch.equal(_tensor(written, role, layer, expert), _tensor(dense, role, layer, expert).float())
    quantized = dense.as_written(of_onnx).expert(Role.EXPERT_UP, 1, 0)
    assert 0 < (quantized - dense.expert(Role.EXPERT_UP, 1, 0).float()).abs().max() < 0.1
    for weights in (of_gguf, of_onnx):
        assert weights.tensor(Role.ROUTER, 0).shape == (1, dense.spec.hidden_size)
        with pytest.raises(InputError, match="no tensor of the role router"):
            weights.tunable(Role.ROUTER, 0)


@pytest.fixture(scope="module")
def files(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files of the student, whole."""
    folder = tmp_path_factory.mktemp("files")
    write_gguf(student, "Q4_0", folder / "x.gguf", name="x", threads=1)
    write_onnx(student, "Q4_0", folder, threads=1)
    return folder


@pytest.mark.parametrize("n_bytes", [0, 10, 1000, 100_000, -1])
def test_truncated_gguf_is_refused(student: Student, files: Path, tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes((files / "x.gguf").read_bytes()[:n_bytes])
    with pytest.raises(InputError, match=r"x\.gguf is truncated"):
        GgufWeights(path, student.spec)


def test_gguf_that_changes_while_it_is_read_is_refused(student: Student, files: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(files / "x.gguf", tmp_path))
    weights = GgufWeights(path, student.spec)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"tensor blk\.1\.ffn_down_exps\.weight cannot be read"):
        weights.read_expert(Role.EXPERT_DOWN, 1, 3, torch.empty(256, student.spec.expert_width))


def test_gguf_of_another_model_is_refused(student: Student, files: Path) -> None:
    with pytest.raises(InputError, match=r"token_embd\.weight has shape \[4096, 256\]"):
        GgufWeights(files / "x.gguf", replace(student.spec, vocab_size=5000))
    with pytest.raises(InputError, match=r"blk\.2\.attn_norm\.weight"):
        GgufWeights(files / "x.gguf", altered(student.spec, n_layers=3))
    with pytest.raises(InputError, match=r"ffn_gate_inp\.weight has shape \[4, 256\].*\[8, 256\]"):
        GgufWeights(files / "x.gguf", student.spec.with_experts(8))


def test_gguf_of_unknown_types_is_refused(student: Student, files: Path, tmp_path: Path) -> None:
    name = b"blk.1.ffn_gate_inp.weight"
    for number, message in ((99, "number 99"), (int(gguf.GGMLQuantizationType.I32), "I32")):
        data = bytearray((files / "x.gguf").read_bytes())
        at = data.index(name) + len(name) + 4 + 2 * 8  # after the name, two dimensions
        data[at : at + 4] = number.to_bytes(4, "little")
        (tmp_path / "y.gguf").write_bytes(data)
        with pytest.raises(InputError, match=rf"ffn_gate_inp.*{message}"):
            GgufWeights(tmp_path / "y.gguf", student.spec)


def test_damaged_onnx_is_refused(student: Student, files: Path, tmp_path: Path) -> None:
    for name in (MODEL_FILE, DATA_FILE):
        shutil.copy(files / name, tmp_path)
    data, graph = (tmp_path / DATA_FILE).read_bytes(), (tmp_path / MODEL_FILE).read_bytes()
    (tmp_path / DATA_FILE).write_bytes(data[:-100_000])
    with pytest.raises(InputError, match=r"model\.onnx\.data is truncated"):
        OnnxWeights(tmp_path, student.spec)
    (tmp_path / DATA_FILE).write_bytes(data)
    (tmp_path / MODEL_FILE).write_bytes(graph[: len(graph) // 2])
    with pytest.raises(InputError, match=r"model\.onnx is truncated or no model"):
        OnnxWeights(tmp_path, student.spec)
    (tmp_path / MODEL_FILE).unlink()
    with pytest.raises(InputError, match=r"model\.onnx cannot be opened"):
        OnnxWeights(tmp_path, student.spec)


def test_onnx_of_another_model_is_refused(student: Student, files: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gate\.weight has shape \[4, 256\].*\[8, 256\]"):
        OnnxWeights(files, student.spec.with_experts(8))
    model = onnx.load(files / MODEL_FILE, load_external_data=False)
    router = next(tensor for tensor in model.graph.initializer if tensor.name == student.name(Role.ROUTER, 1))
    router.name = "something else"
    shutil.copy(files / DATA_FILE, tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=rf"has no tensor {student.name(Role.ROUTER, 1)}"):
        OnnxWeights(tmp_path, student.spec)
