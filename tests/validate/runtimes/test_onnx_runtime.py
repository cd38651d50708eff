"""ONNX Runtime as a backend, against transformers, and on files that were tampered with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressors.model.config.reading import read_spec
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.files.onnx_names import NUM_LOGITS_TO_KEEP
from compressors.model.running.recorder import RoutingRecorder
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE
from exporter.writing.onnx.writer import write_onnx
from validate.files.graph_settings import graph_setting_symptoms
from validate.metrics.generation import greedy
from validate.runtimes.backend import ChunkOutput, scored_positions
from validate.runtimes.measure import RuntimeCrashError, measure_artifact
from validate.runtimes.onnx import OnnxRuntimeBackend, OnnxRuntimeError, measure

Tokens = npt.NDArray[np.int64]


@pytest.fixture(scope="module")
def folder(family_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each trained model as float32 ONNX."""
    path = tmp_path_factory.mktemp("onnx")
    write_onnx(Student.teacher(open_source(family_folder)), "F32", path, threads=1)
    return path


@pytest.fixture(scope="module")
def reference(family_folder: Path) -> PreTrainedModel:
    """The same model in transformers."""
    return AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def chunks(heldout_tokens: Tokens) -> Tokens:
    """Two chunks of 512 tokens from different domains."""
    middle = len(heldout_tokens) // 2
    return np.stack([heldout_tokens[:512], heldout_tokens[middle : middle + 512]])


def test_logits_and_routing_are_those_of_transformers(
    family_folder: Path, folder: Path, reference: PreTrainedModel, chunks: Tokens
) -> None:
    outputs = list(OnnxRuntimeBackend(folder, threads=1).run(chunks))
    assert len(outputs) == len(chunks)
    differing = positions = 0
    for tokens, output in zip(chunks, outputs, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor(tokens[None]), output_router_logits=True)
        same_LT = _same_experts(output, expected.router_logits, read_spec(family_folder))
        differing += int((~same_LT).sum())
        positions += same_LT.size
        scored = scored_positions(len(tokens))
        error_S = np.abs(output.logits_SV - expected.logits[0, scored].numpy()).max(axis=1)
        assert error_S[same_LT[:, scored].all(axis=0)].max() <= 1e-3
    assert differing <= positions // 1000


def _same_experts(
    output: ChunkOutput, router_logits: tuple[torch.Tensor, ...], spec: ModelSpec
) -> npt.NDArray[np.bool_]:
    """bool [L, T]: whether the routed sets agree; where they do, so must the applied weights."""
    logits_LTE = torch.stack([each.reshape(-1, each.shape[-1]) for each in router_logits])
    weights_LTK, experts_LTK = logits_LTE.softmax(-1).topk(spec.top_k)
    if any(layer.routed is not None and layer.routed.routing.normalizes for layer in spec.layers):
        weights_LTK = weights_LTK / weights_LTK.sum(-1, keepdim=True)
    assert output.routing.experts_LTK.shape == tuple(experts_LTK.shape)
    same_LT = np.all(np.sort(output.routing.experts_LTK) == experts_LTK.sort().values.numpy(), axis=-1)
    assert np.abs(output.routing.weights_LTK - weights_LTK.numpy())[same_LT].max() < 1e-4
    return np.asarray(same_LT)


def test_greedy_tokens_through_the_cache(folder: Path, reference: PreTrainedModel, chunks: Tokens) -> None:
    prompt = torch.tensor(chunks[:1, :40])
    with torch.no_grad():
        expected = reference.generate(prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False)[0, 40:]
    backend = OnnxRuntimeBackend(folder, threads=1)
    assert backend.generate(prompt[0].tolist(), 32, greedy) == expected.tolist()
    list(backend.run(chunks[:1]))  # from now on the debug copy runs
    assert backend.generate(prompt[0].tolist(), 32, greedy) == expected.tolist()


def test_last_logits_are_made_alone(folder: Path, chunks: Tokens, capfd: pytest.CaptureFixture[str]) -> None:
    """They are those of the whole run, before and after the debug copy runs; the runtime prints no warning."""
    backend = OnnxRuntimeBackend(folder, threads=1)
    (before,) = backend.last_logits([chunks[0].tolist()], [5])
    (output,) = backend.run(chunks[:1])
    (after,) = backend.last_logits([chunks[0].tolist()], [5])
    for found in (before, after):
        assert found.shape == (5, backend.vocab_size)
        assert np.abs(found[:4] - output.logits_SV[-4:]).max() < 1e-3  # the last position is not scored
    assert not capfd.readouterr().err


def test_a_graph_that_always_makes_all_logits(
    family_folder: Path, folder: Path, tmp_path: Path, chunks: Tokens
) -> None:
    """Such are those of earlier versions, and of others."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    _make_all_logits(model.graph)
    (tmp_path / MODEL_FILE).write_bytes(model.SerializeToString())
    shutil.copyfile(folder / DATA_FILE, tmp_path / DATA_FILE)
    ours, theirs = (OnnxRuntimeBackend(path, threads=1) for path in (folder, tmp_path))
    prompt = chunks[0, :40].tolist()
    assert theirs.generate(prompt, 8, greedy) == ours.generate(prompt, 8, greedy)
    (expected,), (found,) = ours.run(chunks[:1]), theirs.run(chunks[:1])
    np.testing.assert_array_equal(found.logits_SV, expected.logits_SV)
    np.testing.assert_array_equal(found.routing.experts_LTK, expected.routing.experts_LTK)
    assert graph_setting_symptoms(tmp_path / MODEL_FILE, read_spec(family_folder)) == []


def test_an_attribute_of_no_type_is_named(family_folder: Path, folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    cast = next(node for node in model.graph.node if node.op_type == "Cast")
    del cast.attribute[:]
    cast.attribute.append(onnx.helper.make_attribute("to", onnx.TensorProto()))
    (tmp_path / MODEL_FILE).write_bytes(model.SerializeToString())
    shutil.copyfile(folder / DATA_FILE, tmp_path / DATA_FILE)
    (symptom,) = graph_setting_symptoms(tmp_path / MODEL_FILE, read_spec(family_folder))
    assert symptom.startswith("Cast to:")


def _make_all_logits(graph: onnx.GraphProto) -> None:
    """Puts a constant 0, for all positions, in the place of the input that asks for a number of logits."""
    kept = [value for value in graph.input if value.name != NUM_LOGITS_TO_KEEP]
    del graph.input[:]
    graph.input.extend(kept)
    (number,) = (tensor for tensor in graph.initializer if tensor.name == NUM_LOGITS_TO_KEEP)
    number.CopyFrom(onnx.numpy_helper.from_array(np.array(0), "all"))
    for node in graph.node:
        node.input[:] = ["all" if name == NUM_LOGITS_TO_KEEP else name for name in node.input]
    graph.output[0].type.tensor_type.shape.dim[1].dim_param = "sequence"


def test_a_prompt_longer_than_a_chunk(folder: Path, reference: PreTrainedModel, heldout_tokens: Tokens) -> None:
    prompt = torch.tensor(heldout_tokens[None, 5000:5700])
    with torch.no_grad():
        expected = reference.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 700:]
    assert OnnxRuntimeBackend(folder, threads=1).generate(prompt[0].tolist(), 4, greedy) == expected.tolist()


def test_permuted_router_rows_are_noticed(family_folder: Path, folder: Path, tmp_path: Path, chunks: Tokens) -> None:
    """Routing comes from the file: the tokens of the damaged layer go elsewhere."""
    student = Student.teacher(open_source(family_folder))
    router = student.tensor(Role.ROUTER, 2)
    damaged = student.with_overlay({student.name(Role.ROUTER, 2): router.roll(1, dims=0).float()})
    write_onnx(damaged, "F32", tmp_path, threads=1)
    (good,) = OnnxRuntimeBackend(folder, threads=1).run(chunks[:1])
    (bad,) = OnnxRuntimeBackend(tmp_path, threads=1).run(chunks[:1])
    np.testing.assert_array_equal(good.routing.experts_LTK[:2], bad.routing.experts_LTK[:2])
    assert (good.routing.experts_LTK[2] != bad.routing.experts_LTK[2]).mean() > 0.9


def test_routing_rule_is_read_from_the_node(folder: Path, tmp_path: Path, chunks: Tokens) -> None:
    """A graph that asks for one expert and no renormalising reports just that."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    for node in (node for node in model.graph.node if node.op_type == "MoE"):
        for attribute in node.attribute:
            if attribute.name in ("k", "normalize_routing_weights"):
                attribute.i = {"k": 1, "normalize_routing_weights": 0}[attribute.name]
    (tmp_path / MODEL_FILE).write_bytes(model.SerializeToString())
    shutil.copyfile(folder / DATA_FILE, tmp_path / DATA_FILE)
    (output,) = OnnxRuntimeBackend(tmp_path, threads=1).run(chunks[:1])
    assert output.routing.experts_LTK.shape[-1] == 1
    assert output.routing.weights_LTK.max() < 1


def test_weights_that_change_under_the_session_are_noticed(
    family_folder: Path, folder: Path, tmp_path: Path, chunks: Tokens
) -> None:
    """The debug copy must be the shipped graph: here the file was replaced between the two."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    backend = OnnxRuntimeBackend(tmp_path, threads=1)
    student = Student.teacher(open_source(family_folder))
    norm = student.tensor(Role.FINAL_NORM)
    write_onnx(student.with_overlay({student.name(Role.FINAL_NORM): norm * 1.01}), "F32", tmp_path, threads=1)
    with pytest.raises(OnnxRuntimeError, match="other logits"):
        list(backend.run(chunks[:1]))


def test_damaged_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.onnx is missing"):
        OnnxRuntimeBackend(tmp_path, threads=1)
    (tmp_path / MODEL_FILE).write_bytes(b"not a model")
    with pytest.raises(InputError, match="does not load"):
        OnnxRuntimeBackend(tmp_path, threads=1)
    shutil.copyfile(folder / MODEL_FILE, tmp_path / MODEL_FILE)
    with pytest.raises(InputError, match="does not load"):
        OnnxRuntimeBackend(tmp_path, threads=1)
    (tmp_path / DATA_FILE).write_bytes((folder / DATA_FILE).read_bytes()[:1_000_000])
    with pytest.raises(InputError, match="does not load"):
        OnnxRuntimeBackend(tmp_path, threads=1)


def test_measuring_needs_a_prompt_and_room(folder: Path) -> None:
    with pytest.raises(InputError, match="at least 64"):
        measure(folder, context=32, threads=1, prompt_tokens=[1])
    with pytest.raises(InputError, match="prompt"):
        measure(folder, context=64, threads=1, prompt_tokens=[])


def test_cost_is_measured_in_a_process_of_its_own(folder: Path, chunks: Tokens) -> None:
    cost = measure_artifact("onnx", folder, context=128, kv_type="f32", threads=1, prompt=chunks[0])
    assert cost.peak_rss_bytes > cost.base_rss_bytes > 0
    assert min(cost.load_seconds, cost.prefill_tokens_per_second, cost.decode_tokens_per_second) > 0
    assert (cost.prefill_runs, cost.decode_runs) == (1, 32)
    assert cost.buffers is None, "ONNX Runtime tells nothing"
    with pytest.raises(RuntimeCrashError, match="nowhere is missing"):
        measure_artifact("onnx", folder / "nowhere", context=128, kv_type="f32", threads=1, prompt=chunks[0])


def test_four_bit_routing_without_renormalisation_is_read(olmoe_folder: Path, chunks: Tokens, tmp_path: Path) -> None:
    """QMoE is given the gates of all experts there, by a node that must be recognised as the softmax of its logits."""
    student = Student.teacher(open_source(olmoe_folder))
    write_onnx(student, "Q4_0", tmp_path, inputs="float32", threads=1)
    (output,) = OnnxRuntimeBackend(tmp_path, threads=1).run(chunks[:1])
    assert output.routing is not None
    written = student.as_written(OnnxWeights(tmp_path, student.spec))
    recorder = RoutingRecorder(student.spec)
    StreamedModel(written).stream([TokenGroup(torch.from_numpy(chunks[:1]), [recorder.observe])])
    expected = recorder.routing()
    same_LT = np.all(np.sort(output.routing.experts_LTK) == np.sort(expected.experts_LTK), axis=-1)
    assert same_LT.mean() > 0.99
    weights_LTK = np.sort(output.routing.weights_LTK)[same_LT]
    assert np.abs(weights_LTK - np.sort(expected.weights_LTK)[same_LT]).max() < 1e-3
