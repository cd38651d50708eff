"""Dense students in every container: each holds a plain feed-forward and computes what the streamed student does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compressors.calibration.statistics import StatisticsCollector, importance
from compressors.model.description.roles import Role
from compressors.model.description.spec import NO_MOE, MoeSize
from compressors.model.errors import UnsupportedError
from compressors.model.files.onnx_names import NUM_LOGITS_TO_KEEP
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, Student
from compressors.quantize import GGMLQuantizationType
from compressors.quantize.kernels import quantize_rows
from compressors.shrink.condense import Condense
from compressors.shrink.dense import dense_size
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from compressors.shrink.slim.width import SlimWidth
from exporter.writing.gguf.writer import predict_file_size, write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE
from exporter.writing.onnx.writer import predict_size, write_onnx
from validate.metrics.evaluation import evaluate
from validate.metrics.generation import greedy
from validate.runtimes.backend import Backend, scored_positions
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.runtimes.torch import TorchBackend

_EXACT = 1e-3  # logits reach 17; float32 in another order of summation
_N_TOKENS = 96
_TYPES = {"fine": ("qwen3", "Qwen3ForCausalLM"), "coarse": ("mistral", "MistralForCausalLM")}
_GGUF_ARCHITECTURES = {"fine": "qwen3", "coarse": "llama"}
_DENSE_ROLES = {Role.EXPERT_GATE: "ffn_gate", Role.EXPERT_UP: "ffn_up", Role.EXPERT_DOWN: "ffn_down"}

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=sorted(_TYPES))
def model(request: pytest.FixtureRequest) -> str:
    """Each family with a dense counterpart in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def source(model: str, tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Source:
    """Two layers."""
    return open_source(toy_checkpoint(tmp_path_factory.mktemp("dense"), n_layers=2, model=model))


@pytest.fixture(scope="module")
def student(source: Source, heldout_tokens: Tokens) -> Student:
    return _compressed(source, heldout_tokens, [_dense_layer(source, 0), _dense_layer(source, 1)])


def _dense_layer(source: Source, layer: int) -> LayerTarget:
    return LayerTarget(layer, dense_size(source.spec), (Condense(),))


def _compressed(source: Source, heldout_tokens: Tokens, targets: Sequence[LayerTarget]) -> Student:
    text_BT = torch.from_numpy(heldout_tokens[: 4 * 128].reshape(4, 128))
    collector = StatisticsCollector(source.spec)
    StreamedModel(Student.teacher(source)).stream([TokenGroup(text_BT, [collector.observe])])
    statistics = [collector.take(layer) for layer in range(source.spec.n_layers)]
    layers = list(LayerwiseCompression(source, targets, statistics, text_BT, n_sample_blocks=4).run())
    overlay = {name: tensor for layer in layers for name, tensor in layer.overlay.items()}
    experts = ExpertMap(source.spec.n_experts, tuple(layer.map for layer in layers))
    experts.check_against(source.spec)
    return Student(source, experts).with_overlay(overlay)


@pytest.fixture(scope="module")
def tokens_T(heldout_tokens: Tokens) -> Tokens:
    return heldout_tokens[30_000 : 30_000 + _N_TOKENS]


@pytest.fixture(scope="module")
def logits_TV(student: Student, tokens_T: Tokens) -> Logits:
    return _streamed(student, tokens_T)


@torch.no_grad()
def _streamed(student: Student, tokens_T: Tokens) -> Logits:
    model = StreamedModel(student)
    (hidden,) = model.stream([TokenGroup(torch.from_numpy(tokens_T)[None])])
    logits: Logits = torch.cat([part for _, part in model.logits_in_chunks(hidden, slice(0, len(tokens_T)))]).numpy()
    return logits


def _divergence(expected_TV: Logits, found_TV: Logits) -> float:
    expected, found = (torch.from_numpy(logits).log_softmax(-1) for logits in (expected_TV, found_TV))
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def test_the_shape_says_dense_and_counts_no_router(student: Student, source: Source) -> None:
    spec = student.spec
    assert not spec.written.n_experts and source.spec.written.n_experts
    assert spec.expert_width == source.spec.top_k * source.spec.expert_width
    assert all(Role.ROUTER not in layer.roles for layer in spec.written.layers)
    router = source.spec.n_experts * source.spec.hidden_size
    unused = (source.spec.n_experts - source.spec.top_k) * source.spec.layers[0].expert_parameters
    assert spec.written.parameters == source.spec.parameters - 2 * (router + unused)


def test_llama_cpp_runs_it_as_a_dense_model(
    student: Student, tokens_T: Tokens, logits_TV: Logits, tmp_path: Path
) -> None:
    path = tmp_path / "f32.gguf"
    write_gguf(student, "F32", path, name="x", threads=1)
    assert path.stat().st_size == predict_file_size(student.spec, student.source, "F32", "x")
    llama = llama_cpp.Llama(
        str(path), n_ctx=_N_TOKENS, n_batch=_N_TOKENS, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False
    )
    llama.eval(tokens_T.tolist())
    found_TV = np.array(llama.scores[:_N_TOKENS])
    llama.close()
    assert np.abs(found_TV - logits_TV).max() < _EXACT


def test_gguf_metadata_and_tensors_know_no_experts(model: str, student: Student, tmp_path: Path) -> None:
    write_gguf(student, "Q4_0", tmp_path / "x.gguf", name="x", threads=1)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    architecture = _GGUF_ARCHITECTURES[model]
    assert metadata["general.architecture"] == architecture
    assert metadata[f"{architecture}.feed_forward_length"] == student.spec.expert_width
    assert metadata["general.size_label"] == gguf.size_label(student.spec.parameters, 0, 0, 0)
    assert not [key for key in metadata if "expert" in key]
    names = [tensor.name for tensor in reader.tensors]
    assert not [name for name in names if "exps" in name or "ffn_gate_inp" in name]
    layer_names = {f"blk.1.{name}.weight" for name in _DENSE_ROLES.values()}
    assert layer_names < set(names)


def test_q4_0_has_the_predicted_size_and_the_quantized_neurons(
    student: Student, tokens_T: Tokens, logits_TV: Logits, heldout_tokens: Tokens, tmp_path: Path
) -> None:
    collector = StatisticsCollector(student.spec)
    text_BT = torch.from_numpy(heldout_tokens[: 2 * 128].reshape(2, 128))
    StreamedModel(student).stream([TokenGroup(text_BT, [collector.observe])])
    matrix = importance([collector.take(0), collector.take(1)], student.experts.of_itself(), student.spec)
    path = tmp_path / "q4_0.gguf"
    write_gguf(student, "Q4_0", path, importance=matrix, name="x", threads=1)
    assert path.stat().st_size == predict_file_size(student.spec, student.source, "Q4_0", "x")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for role, name in _DENSE_ROLES.items():
        values = student.expert(role, 1, 0)
        expected = quantize_rows(values, GGMLQuantizationType.Q4_0, matrix[role, 1][0], name=name)
        np.testing.assert_array_equal(stored[f"blk.1.{name}.weight"].data, expected)
    (following,) = LlamaCppBackend(path, n_ctx=128, kv_type="f32", threads=1).generate(tokens_T.tolist(), 1, greedy)
    assert following in logits_TV[-1].argsort()[-3:], "4 bits cost a little"


def test_onnx_runtime_runs_it_without_a_moe_node(
    model: str, student: Student, tokens_T: Tokens, logits_TV: Logits, tmp_path: Path
) -> None:
    write_onnx(student, "F32", tmp_path / "onnx", threads=1)
    assert _written_bytes(tmp_path / "onnx") == predict_size(student.spec, "F32")
    graph = onnx.load(tmp_path / "onnx" / MODEL_FILE, load_external_data=False).graph
    assert graph.name == _TYPES[model][0]
    assert {node.op_type for node in graph.node}.isdisjoint({"MoE", "QMoE"})
    assert not [tensor.name for tensor in graph.initializer if "expert" in tensor.name or "mlp.gate." in tensor.name]
    assert np.abs(_run_onnx(student, tmp_path / "onnx", tokens_T) - logits_TV).max() < _EXACT
    backend = OnnxRuntimeBackend(tmp_path / "onnx", threads=1)
    assert backend.generate(tokens_T.tolist(), 1, greedy) == [logits_TV[-1].argmax()]


def test_onnx_in_q4_0(student: Student, tokens_T: Tokens, logits_TV: Logits, tmp_path: Path) -> None:
    write_onnx(student, "Q4_0", tmp_path / "onnx", threads=1)
    assert _written_bytes(tmp_path / "onnx") == predict_size(student.spec, "Q4_0")
    assert 0 < _divergence(logits_TV, _run_onnx(student, tmp_path / "onnx", tokens_T)) < 0.1


def test_no_backend_tells_of_routing_and_all_give_the_same_logits(
    student: Student, tokens_T: Tokens, logits_TV: Logits, tmp_path: Path
) -> None:
    write_gguf(student, "F32", tmp_path / "f32.gguf", name="x", threads=1)
    write_onnx(student, "F32", tmp_path / "onnx", threads=1)
    backends: Sequence[Backend] = (
        TorchBackend(student),
        LlamaCppBackend(tmp_path / "f32.gguf", n_ctx=_N_TOKENS, kv_type="f32", threads=1),
        OnnxRuntimeBackend(tmp_path / "onnx", threads=1),
    )
    expected_SV = logits_TV[scored_positions(_N_TOKENS)]
    for backend in backends:
        for output in backend.run(np.stack([tokens_T, tokens_T])):
            assert output.routing is None
            assert np.abs(output.logits_SV - expected_SV).max() < _EXACT
        evaluation = evaluate(backend, tokens_T[None], {})
        assert evaluation.routing is None


def _written_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in (MODEL_FILE, DATA_FILE))


def _run_onnx(student: Student, folder: Path, tokens_T: Tokens) -> Logits:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of logits of more positions than one
    session = onnxruntime.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
    n_tokens, spec, mixer = len(tokens_T), student.spec, student.spec.layers[0].mixer
    feeds: Mapping[str, Any] = {
        "input_ids": tokens_T[None],
        "attention_mask": np.ones((1, n_tokens), dtype=np.int64),
        "position_ids": np.arange(n_tokens)[None],
        NUM_LOGITS_TO_KEEP: np.array(0),
    }
    empty = np.zeros((1, mixer.n_kv_heads, 0, mixer.head_dim), dtype=np.float32)
    past = {f"past_key_values.{layer}.{kind}": empty for layer in range(spec.n_layers) for kind in ("key", "value")}
    (logits_BTV,) = session.run(["logits"], {**feeds, **past})
    logits_TV: Logits = logits_BTV[0]
    return logits_TV


def test_onnx_clients_see_the_dense_architecture(
    model: str, student: Student, tokens_T: Tokens, tmp_path: Path
) -> None:
    write_onnx(student, "F32", tmp_path, threads=1)
    write_client_files(student, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.intermediate_size) == (_TYPES[model][0], student.spec.expert_width)
    prompt = tokens_T[:40].tolist()
    parameters = onnxruntime_genai.GeneratorParams(genai := onnxruntime_genai.Model(str(tmp_path)))
    parameters.set_search_options(max_length=len(prompt) + 4)
    generator = onnxruntime_genai.Generator(genai, parameters)
    generator.append_tokens(prompt)
    generator.generate_next_token()
    assert generator.get_next_tokens()[0] == _streamed(student, tokens_T[:40])[-1].argmax()


@torch.no_grad()
def test_stock_transformers_loads_the_dense_architecture(
    model: str, student: Student, tokens_T: Tokens, logits_TV: Logits, tmp_path: Path
) -> None:
    write_checkpoint(student, tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == (_TYPES[model][0], [_TYPES[model][1]])
    assert not [key for key in config if "expert" in key or "moe" in key or "router" in key]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", dtype=torch.float32, output_loading_info=True
    )
    stock, report = loaded
    assert type(stock).__name__ == _TYPES[model][1]
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    found_TV = stock.eval()(torch.from_numpy(tokens_T)[None]).logits[0].numpy()
    assert np.abs(found_TV - logits_TV).max() < 1e-4


def test_layers_that_differ_are_refused_but_by_onnx(
    source: Source, heldout_tokens: Tokens, tokens_T: Tokens, tmp_path: Path
) -> None:
    student = _compressed(source, heldout_tokens, [_dense_layer(source, 0), LayerTarget(1, NO_MOE)])
    assert not student.spec.written.n_experts
    write_onnx(student, "F32", tmp_path / "onnx", threads=1)
    found_TV = _run_onnx(student, tmp_path / "onnx", tokens_T)
    assert np.abs(found_TV - _streamed(student, tokens_T)).max() < _EXACT
    with pytest.raises(
        UnsupportedError, match=r"graph has one .* these layers have 1 experts of width \d+, no experts"
    ):
        write_gguf(student, "F32", tmp_path / "x.gguf", name="x", threads=1)
    with pytest.raises(UnsupportedError, match="transformers could not load"):
        write_checkpoint(student, tmp_path / "student")


def test_experts_can_become_narrower_first(source: Source, heldout_tokens: Tokens) -> None:
    half = source.spec.expert_width // 2
    size = MoeSize(1, source.spec.top_k * half)
    targets = [LayerTarget(layer, size, (SlimWidth(half), Condense())) for layer in range(2)]
    student = _compressed(source, heldout_tokens, targets)
    assert not student.spec.written.n_experts
    assert student.spec.expert_width == size.expert_width


def test_a_family_without_a_dense_counterpart_keeps_its_one_expert(
    toy_checkpoint: Callable[..., Path], tokens_T: Tokens, tmp_path: Path
) -> None:
    source = open_source(toy_checkpoint(tmp_path, n_layers=2, model="olmoe"))
    student = Student(source, ExpertMap.keeping(source.spec.n_experts, ((3,), (5,))))
    assert student.spec.written.n_experts == 1
    path = tmp_path / "x.gguf"
    write_gguf(student, "F32", path, name="x", threads=1)
    assert gguf.GGUFReader(path).fields["olmoe.expert_count"].contents() == 1
    (following,) = LlamaCppBackend(path, n_ctx=128, kv_type="f32", threads=1).generate(tokens_T.tolist(), 1, greedy)
    assert following == _streamed(student, tokens_T)[-1].argmax()
