"""Graphs of experts that stand on shared bases, against torch with the same experts multiplied out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.errors import InputError
from compressors.model.sources import onnx_weights
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import Student
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.encodings import onnx_units
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE, plan_tensors
from exporter.writing.onnx.memory import predict_runtime_bytes
from exporter.writing.onnx.writer import predict_size, write_onnx
from tests.exporter.writing.onnx.genai import continue_prompt
from tests.exporter.writing.onnx.on_bases import student_on_bases
from tests.exporter.writing.onnx.session import Session, Tokens, padded
from tests.exporter.writing.onnx.test_onnx_memory import check_unit_bytes
from validate.files.file_facts import onnx_facts
from validate.files.graph_settings import graph_setting_symptoms
from validate.files.weight_comparison import compare_weights
from validate.metrics.generation import greedy
from validate.runtimes.measure import measure_artifact
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.runtimes.torch import TorchBackend

_EXACT = 1e-4
_ZERO = SharedBases.ZERO
_STANDS: dict[str, tuple[str, Sequence[int | None], int]] = {
    "two bases": ("fine", (*[None] * 12, *[0, 1] * 10), 8),
    "a base and none": ("coarse", (None, _ZERO, 0, 0, _ZERO, 0, 0, 0), 8),
    "few": ("olmoe", (*[None] * 13, 0, 0, 0), 16),
    "no base at all": ("olmoe", (_ZERO,) * 16, 16),
}
"""The checkpoint, the base of each expert, and the rank. OLMoE's weights do not add up to 1; of few, most tokens choose
none."""


@dataclass(frozen=True)
class _Written:
    """A student, its folder, and the student that the folder holds."""

    student: Student
    folder: Path
    held: Student
    preset: str
    predicted_bytes: int


_CASES = (
    ("two bases", "F32", "separate"),
    ("two bases", "Q4_0", "joined"),
    ("a base and none", "Q4_0", "separate"),
    ("a base and none", "F32", "joined"),
    ("few", "F32", "joined"),
    ("no base at all", "Q4_0", "joined"),
)
"""The student, the preset, and whether all bases multiply all tokens, on which their size decides."""


@pytest.fixture(scope="module", params=_CASES, ids="-".join)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]
) -> Iterator[_Written]:
    """Two layers, in float32, and at 4 bits with products of float32 inputs."""
    name, preset, bases = request.param
    model, base_of, rank = _STANDS[name]
    folder = tmp_path_factory.mktemp("bases")
    student = student_on_bases(toy_checkpoint(folder, n_layers=2, model=model), base_of, rank)
    encodings = _encodings(student, preset)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(onnx_weights, "_JOINED_VALUES", 0 if bases == "separate" else 1 << 30)
        write_onnx(student, preset, folder / "onnx", encodings=encodings, inputs="float32", threads=1)
        predicted = predict_size(student.spec, preset, encodings)
        held = student.as_written(OnnxWeights(folder / "onnx", student.spec))
        yield _Written(student, folder / "onnx", held, preset, predicted)


def _encodings(student: Student, preset: str) -> dict[str, str]:
    """Embedding and head at 4 bits too, whose products have float32 inputs."""
    outside = [unit.name for unit in onnx_units(student.spec) if unit.layer is None]
    return {} if preset == "F32" else dict.fromkeys(outside, "Q4_0")


def _torch_logits(student: Student, tokens_T: Tokens) -> npt.NDArray[np.float32]:
    (logits,) = TorchBackend(student).last_logits([tokens_T.tolist()], [len(tokens_T)])
    return logits


def test_the_graph_computes_what_torch_does(written: _Written, heldout_tokens: Tokens) -> None:
    """One token goes another way than several: both are exact, in a prompt and behind one."""
    session, tokens = Session(written.folder), heldout_tokens[:300]
    expected = _torch_logits(written.held, tokens)
    for length in (1, 7, 300):
        found = session.feed(tokens[None, :length], np.ones((1, length), np.int64))
        assert np.abs(found[0] - expected[:length]).max() < _EXACT
    session.feed(tokens[None, :7], np.ones((1, 7), np.int64))
    for place in range(7, 19):
        step = session.feed(tokens[None, place : place + 1], np.ones((1, place + 1), np.int64), cached=True)
        assert np.abs(step[0, 0] - expected[place]).max() < _EXACT
        assert step[0, 0].argmax() == expected[place].argmax()


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_those_alone(written: _Written, heldout_tokens: Tokens, side: str) -> None:
    rows = [heldout_tokens[100:120], heldout_tokens[700:707]]
    tokens, mask = padded(rows, side)
    session = Session(written.folder)
    logits = session.feed(tokens, mask)
    step = session.feed(heldout_tokens[900:902, None], np.pad(mask, ((0, 0), (0, 1)), constant_values=1), cached=True)
    for row, values in enumerate(rows):
        expected = _torch_logits(written.held, np.append(values, heldout_tokens[900 + row]))
        used = logits[row, 20 - len(values) :] if side == "left" else logits[row, : len(values)]
        assert np.abs(used - expected[:-1]).max() < _EXACT
        assert np.abs(step[row, 0] - expected[-1]).max() < _EXACT


def test_the_file_holds_bases_and_adapters(written: _Written) -> None:
    """Float32 exactly; else a base as its type rounds it, and adapters at 8 bits."""
    student, held, is_float = written.student, written.held, written.preset == "F32"
    bases = student.spec.layers[1].bases
    assert bases is not None
    for expert, base in enumerate(bases.base_of):
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
            found = held.expert(role, 1, expert)
            if base is None:
                expected = student.expert(role, 1, expert).float()
            else:
                a_RI, b_OR = student.adapter(role, 1, expert)
                below = student.base(role, 1, base).float() if base >= 0 else torch.zeros(1)
                expected = below + b_OR @ a_RI
            error = (found - expected).norm() / expected.norm()
            assert error < 1e-6 if is_float else error < (0.012 if base == _ZERO else 0.1)
    weights = OnnxWeights(written.folder, student.spec)
    comparison = compare_weights(student, held, weights.stored_type)
    assert comparison.damage == ()


def test_experts_on_bases_have_no_scales_to_tune(written: _Written) -> None:
    weights = OnnxWeights(written.folder, written.student.spec)
    assert weights.block_length(Role.EXPERT_UP, 0) is None
    with pytest.raises(InputError, match="stand on bases"):
        weights.tunable(Role.EXPERT_UP, 0)
    assert (weights.block_length(Role.QUERY, 0) is None) == (written.preset == "F32")


def test_memory_of_their_unit_is_what_another_encoding_saves(written: _Written) -> None:
    check_unit_bytes(written.student.spec, "int8")


def test_bytes_are_those_predicted(written: _Written) -> None:
    student, encodings = written.student, _encodings(written.student, written.preset)
    n_bytes = sum(file.stat().st_size for file in written.folder.iterdir())
    assert n_bytes == written.predicted_bytes
    layout = plan_tensors(student.spec, written.preset, encodings)
    for unit in onnx_units(student.spec):
        weights = [
            weight for weight in layout.weights if weight.layer == unit.layer and set(weight.roles) & set(unit.weights)
        ]
        expected = sum(tensor.n_bytes for weight in weights for tensor in weight.tensors)
        assert unit.encodings[weights[0].encoding.name] == expected
    whole = plan_tensors(student.source.spec, written.preset, encodings)
    saved = whole.data_bytes - layout.data_bytes
    bases = student.spec.layers[0].bases
    assert bases is not None
    of_expert = 4 if written.preset == "F32" else 4.5 / 8
    of_adapter = 4 if written.preset == "F32" else 8.5 / 8
    layer = student.spec.layers[0]
    size = 3 * layer.hidden_size * layer.expert_width * of_expert
    adapter = 3 * bases.rank * (layer.hidden_size + layer.expert_width) * of_adapter
    n_replaced = len(bases.replaced)
    assert saved == pytest.approx(
        2 * (n_replaced * (size - adapter) - bases.n_bases * size), rel=0.02
    )  # but for alignment


def test_validation_reads_the_routing_and_finds_nothing_wrong(written: _Written, heldout_tokens: Tokens) -> None:
    tokens = heldout_tokens[None, :64]
    (of_torch,), (of_runtime,) = (
        TorchBackend(written.held).run(tokens),
        OnnxRuntimeBackend(written.folder, threads=1).run(tokens),
    )
    assert of_torch.routing is not None and of_runtime.routing is not None
    assert np.array_equal(of_torch.routing.experts_LTK, of_runtime.routing.experts_LTK)
    assert np.abs(of_torch.routing.weights_LTK - of_runtime.routing.weights_LTK).max() < 1e-5
    spec = written.student.spec
    facts = onnx_facts(written.folder / MODEL_FILE)
    assert (facts.n_experts, facts.top_k) == (spec.n_experts, spec.top_k)
    assert graph_setting_symptoms(written.folder / MODEL_FILE, spec) == []


def test_a_changed_setting_is_found(written: _Written, tmp_path: Path) -> None:
    model = onnx.load(written.folder / MODEL_FILE, load_external_data=False)
    (choice,) = (node for node in model.graph.node if node.op_type == "If" and "layers.1." in node.output[0])
    branches = [attribute.g for attribute in choice.attribute]
    first = next(node for branch in branches for node in branch.node if node.op_type == "Split")
    first.attribute[0].i = 2
    (tmp_path / MODEL_FILE).write_bytes(model.SerializeToString())
    shutil.copyfile(written.folder / DATA_FILE, tmp_path / DATA_FILE)
    (symptom,) = graph_setting_symptoms(tmp_path / MODEL_FILE, written.student.spec)[:1]
    assert "Split" in symptom


def test_genai_gives_the_same_tokens(written: _Written, heldout_tokens: Tokens) -> None:
    write_client_files(written.student, written.folder)
    prompt = heldout_tokens[:40].tolist()
    expected = OnnxRuntimeBackend(written.folder, threads=1).generate(prompt, 12, greedy)
    tokens, _ = continue_prompt(written.folder, prompt, len(expected))
    assert tokens and tokens == expected[: len(tokens)]


def test_memory_is_within_the_prediction(written: _Written, heldout_tokens: Tokens) -> None:
    encodings = _encodings(written.student, written.preset)
    cost = measure_artifact("onnx", written.folder, context=600, kv_type="f32", threads=2, prompt=heldout_tokens[:600])
    predicted = predict_runtime_bytes(
        written.student.spec, written.preset, 600, threads=2, encodings=encodings, inputs="float32"
    )
    assert 0 < cost.peak_rss_bytes - cost.base_rss_bytes <= sum(predicted.values())
