"""Every family in ONNX Runtime against stock transformers, on random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig

from compressors.model.config.reading import read_spec
from compressors.model.description.mixers import Mixer, NoMixer, ShortConvolution
from compressors.model.errors import UnsupportedError
from compressors.model.files.onnx_names import CACHED, MODEL_FILE, STATES, cache_input
from compressors.model.running.recorder import RoutingRecorder
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.recover.sampling import continue_texts
from exporter.planning.recipe import SourceChoice
from exporter.publishing.described_models import described_source
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.encodings import onnx_units
from exporter.writing.onnx.layout import plan_tensors
from exporter.writing.onnx.memory import predict_runtime_bytes
from exporter.writing.onnx.writer import predict_size, write_onnx
from tests.exporter.writing.onnx.genai import continue_prompt
from tests.exporter.writing.onnx.session import Session, Tokens, padded
from tests.families.checkpoints import spell_as_the_hub
from tests.families.conftest import logits_of
from tests.families.rows import COMMON, ROWS
from validate.files.folder_settings import folder_setting_symptoms
from validate.files.graph_settings import graph_setting_symptoms
from validate.files.weight_comparison import compare_weights
from validate.metrics.generation import greedy
from validate.report.run import onnxruntime_example
from validate.routing.agreement import routing_agreement
from validate.runtimes.backend import scored_positions
from validate.runtimes.onnx import OnnxRuntimeBackend

_EXACT = 1e-4  # of logits whose standard deviation is about 1.5
_MOST = (0, 2, 3, 5, 6, 7, 1, 4)  # the first experts that students keep
_WRITTEN = sorted(name for name, row in ROWS.items() if "onnx" in row.formats)


@pytest.fixture(scope="module", params=_WRITTEN)
def family(request: pytest.FixtureRequest) -> str:
    """The families that are written as ONNX."""
    return str(request.param)


@pytest.fixture(scope="module", params=[8, 6])
def student(request: pytest.FixtureRequest, folder: Path) -> Student:
    """The whole model, and one with fewer experts."""
    source = Checkpoint(folder)
    kept = [_MOST[: request.param] if layer.routed is not None else () for layer in source.spec.layers]
    return Student(source, ExpertMap.keeping(source.spec.n_experts, kept))


@pytest.fixture(scope="module")
def written(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ONNX folder in F32."""
    path = tmp_path_factory.mktemp("onnx")
    write_onnx(student, "F32", path, threads=1)
    write_client_files(student, path)
    return path


_PRUNED = pytest.mark.parametrize("student", [6], indirect=True)
"""For tests of the cache and the mask, whose part of the graph does not depend on the number of experts."""


@torch.no_grad()
def test_onnx_runtime_computes_and_routes_like_torch(student: Student, written: Path, blocks_BT: torch.Tensor) -> None:
    recorder, model = RoutingRecorder(student.spec), StreamedModel(student)
    (hidden,) = model.stream([TokenGroup(blocks_BT, [recorder.observe])])
    everywhere = slice(0, blocks_BT.shape[1])
    expected = torch.cat([logits for _, logits in model.logits_in_chunks(hidden, everywhere)])
    outputs = list(OnnxRuntimeBackend(written, threads=1).run(blocks_BT.numpy()))
    wanted_BSV = expected.view(*blocks_BT.shape, -1)[:, scored_positions(blocks_BT.shape[1])]
    found_BSV = torch.from_numpy(np.stack([output.logits_SV for output in outputs]))
    assert (found_BSV - wanted_BSV).abs().max() < _EXACT
    routings = [output.routing for output in outputs if output.routing is not None]
    found = type(routings[0]).concatenate(routings)
    assert routing_agreement(recorder.routing(), found).mean("overlap") >= 0.99


@torch.no_grad()
@_PRUNED
@pytest.mark.parametrize("length", [1, 7, 300])
def test_texts_of_any_length(student: Student, written: Path, length: int) -> None:
    """Errors grow with the length: after 300 tokens transformers' own two ways to compute a state differ by 1.8e-4."""
    tokens_BT = torch.randint(1, 4096, (1, length), generator=torch.Generator().manual_seed(length))
    expected_TV = logits_of(StreamedModel(student), tokens_BT).numpy()
    (found_TV,) = Session(written).feed(tokens_BT.numpy(), np.ones((1, length), np.int64))
    assert np.abs(found_TV - expected_TV).max() < _EXACT * np.abs(expected_TV).max()


@torch.no_grad()
@_PRUNED
def test_the_same_text_is_written_through_the_cache(student: Student, written: Path, blocks_BT: torch.Tensor) -> None:
    """It is longer than the window, where there is one."""
    prompt_BP = blocks_BT[:1, :20]
    (text,) = continue_texts(StreamedModel(student), prompt_BP, 32, lambda logits_bV, *_: logits_bV.argmax(-1))
    found = OnnxRuntimeBackend(written, threads=1).generate(prompt_BP[0].tolist(), 32, greedy)
    assert found == text[20:].tolist()


def _unlike_layers(source: Checkpoint, kind: str) -> Student:
    """Fewer experts in later layers, and none in the last; or all experts, and no second layer."""
    n_layers, n_experts = source.spec.n_layers, source.spec.n_experts
    if kind == "without a layer":
        kept = {layer: _MOST for layer in range(n_layers) if layer != 1}
    else:
        kept = {layer: _MOST[: 8 - 2 * layer] for layer in range(n_layers - 1)} | {n_layers - 1: ()}
    layers = [
        LayerMap(layer, tuple((expert,) for expert in experts) if source.spec.layers[layer].routed is not None else ())
        for layer, experts in kept.items()
    ]
    return Student(source, ExpertMap(n_experts, tuple(layers)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["different experts", "without a layer"])
def test_layers_may_differ(folder: Path, blocks_BT: torch.Tensor, tmp_path: Path, kind: str) -> None:
    student = _unlike_layers(Checkpoint(folder), kind)
    write_onnx(student, "F32", tmp_path, threads=1)
    assert graph_setting_symptoms(tmp_path / MODEL_FILE, student.spec) == []
    expected_BTV = logits_of(StreamedModel(student), blocks_BT).view(*blocks_BT.shape, -1)
    found_BTV = Session(tmp_path).feed(blocks_BT.numpy(), np.ones(blocks_BT.shape, np.int64))
    # recurrent layers carry a token's rounding on to the next ones, to 1.05e-4 in Qwen3-Next on AMD's Zen 4
    is_recurrent = any(layer.mixer.state_values for layer in student.spec.layers)
    assert np.abs(found_BTV - expected_BTV.numpy()).max() < (2 * _EXACT if is_recurrent else _EXACT)


@torch.no_grad()
@pytest.mark.parametrize(("bits", "allowed"), [(4, 1e-5), (8, 0.1)])
def test_quantized_files(folder: Path, blocks_BT: torch.Tensor, tmp_path: Path, bits: int, allowed: float) -> None:
    """Products of 8 bits may quantize their inputs too, which sends some tokens to other experts."""
    teacher = Student.teacher(Checkpoint(folder))
    units = [unit.name for unit in onnx_units(teacher.spec) if bits == 4 or unit.name.endswith(".experts")]
    write_onnx(teacher, "F32", tmp_path, encodings=dict.fromkeys(units, f"{bits}@16"), inputs="float32", threads=1)
    weights = OnnxWeights(tmp_path, teacher.spec)
    written = teacher.as_written(weights)
    assert compare_weights(teacher, written, weights.stored_type).damage == ()
    expected_BTV = logits_of(StreamedModel(written), blocks_BT).view(*blocks_BT.shape, -1)
    found_BTV = Session(tmp_path).feed(blocks_BT.numpy(), np.ones(blocks_BT.shape, np.int64))
    assert np.abs(found_BTV - expected_BTV.numpy()).mean() < allowed


@torch.no_grad()
@_PRUNED
@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_after_padded_prompts(student: Student, written: Path, blocks_BT: torch.Tensor, side: str) -> None:
    """A row gives the logits that it gives alone, in the prompt and in the steps after it."""
    texts, steps = [blocks_BT[0, :20].numpy(), blocks_BT[1, :7].numpy()], blocks_BT[:, 40:44].numpy()
    tokens, mask = padded(texts, side)
    session = Session(written)
    prompt_logits = session.feed(tokens, mask)
    found = []
    for step in range(steps.shape[1]):
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        found.append(session.feed(steps[:, step : step + 1], mask, cached=True)[:, 0])
    for row, values in enumerate(texts):
        whole = torch.tensor(np.concatenate([values, steps[row]]))[None]
        expected_TV = logits_of(StreamedModel(student), whole).numpy()
        used = prompt_logits[row, -len(values) :] if side == "left" else prompt_logits[row, : len(values)]
        assert np.abs(used - expected_TV[: len(values)]).max() < _EXACT
        assert np.abs(np.stack(found)[:, row] - expected_TV[len(values) :]).max() < _EXACT


def test_prompts_in_chunks(stock: nn.Module, folder: Path, blocks_BT: torch.Tensor, tmp_path: Path) -> None:
    write_onnx(Student.teacher(Checkpoint(folder)), "F32", tmp_path, threads=1)
    tokens: Tokens = blocks_BT[:1].numpy()
    session = Session(tmp_path)
    pieces = [
        session.feed(tokens[:, first:last], np.ones((1, last), np.int64), cached=first > 0)
        for first, last in ((0, 20), (20, 21), (21, 48))
    ]
    with torch.no_grad():
        expected = stock(blocks_BT[:1]).logits.numpy()
    assert np.abs(np.concatenate(pieces, axis=1) - expected).max() < _EXACT


def test_the_folder_is_what_the_checks_ask_for(student: Student, written: Path, folder: Path) -> None:
    assert graph_setting_symptoms(written / MODEL_FILE, student.spec) == []
    assert folder_setting_symptoms(written / MODEL_FILE, Checkpoint(folder), student.spec) == []
    files = (written / MODEL_FILE, written / "model.onnx.data")
    assert predict_size(student.spec, "F32") == sum(file.stat().st_size for file in files)


def test_the_file_holds_the_student_s_values(student: Student, written: Path) -> None:
    found = OnnxWeights(written, student.spec)
    for tensor, layer in student.spec.written.places:
        if not tensor.is_per_expert:
            expected = student.tensor(tensor.role, layer).float()
            assert torch.equal(found.tensor(tensor.role, layer), expected), (tensor.role, layer)
            if tensor.is_quantizable:
                assert torch.equal(found.rows(tensor.role, layer, slice(1, 3)), expected[1:3])
    assert compare_weights(student, student.as_written(found), found.stored_type).damage == ()


def test_changed_vectors_and_routers_are_named(student: Student, written: Path) -> None:
    weights = OnnxWeights(written, student.spec)
    changed = [
        (tensor.role, layer)
        for tensor, layer in student.spec.written.places
        if layer is not None and not tensor.is_quantizable
    ]
    overlay = {student.name(*place): student.tensor(*place).float() * 1.5 for place in changed}
    damage = compare_weights(student.with_overlay(overlay), student.as_written(weights), weights.stored_type).damage
    assert {(entry.unit.role, entry.unit.layer) for entry in damage} == set(changed)


def test_the_report_s_example_runs(written: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = {"source": described_source(SourceChoice(model="x"), Checkpoint(folder))}
    exec(onnxruntime_example(report, written), {})
    assert capsys.readouterr().out.strip()


def _cache_kinds(mixer: Mixer) -> tuple[str, ...]:
    if isinstance(mixer, NoMixer):
        return ()
    if isinstance(mixer, ShortConvolution):
        return STATES[:1]
    return STATES if mixer.is_recurrent else CACHED


def test_genai_generates_the_same_tokens(written: Path, student: Student, blocks_BT: torch.Tensor) -> None:
    """Its caches are as large as the graph's, and what is predicted."""
    prompt = blocks_BT[0, :20].tolist()
    expected = OnnxRuntimeBackend(written, threads=1).generate(prompt, 12, greedy)
    tokens, generator = continue_prompt(written, prompt, len(expected))
    assert tokens and tokens == expected[: len(tokens)]
    caches = [
        generator.get_input(cache_input(index, kind))
        for index, layer in enumerate(student.spec.layers)
        for kind in _cache_kinds(layer.mixer)
    ]
    predicted = predict_runtime_bytes(student.spec, "F32", len(prompt) + len(expected), threads=1)["kv_cache"]
    assert predicted == sum(cache.nbytes for cache in caches)


@pytest.mark.parametrize("name", sorted(set(ROWS) - set(_WRITTEN)))
def test_others_are_refused(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    AutoConfig.for_model(name, **{**COMMON, **row.sizes}).save_pretrained(tmp_path)
    spell_as_the_hub(tmp_path / "config.json", row)
    with pytest.raises(UnsupportedError, match="use --formats gguf"):
        plan_tensors(read_spec(tmp_path), "F32")
