"""Files of which one layer at a time is there hold the numbers of the whole files, and take a layer's room."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compressors.calibration.layer_inputs import PassingInputs
from compressors.calibration.second_moments import SecondMoments
from compressors.calibration.splits import read_splits, tokenize
from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from compressors.model.sources.weights import Weights
from compressors.recover.divergence import judge
from exporter.writing import layer_by_layer
from exporter.writing.feedback import StudentFeedback
from exporter.writing.gguf.writer import gguf_by_layer, write_gguf
from exporter.writing.layer_by_layer import LayerByLayer
from exporter.writing.onnx.writer import onnx_by_layer, write_onnx
from tests.exporter.calibrated import Calibrated
from tests.exporter.writing.onnx.on_bases import student_on_bases

_MIX = "Q4_0"  # of both containers
_SCORED = slice(256, 511)
_PAGES = 64 << 10  # bytes of the file system's blocks that are not full


@pytest.fixture(scope="module")
def calibrated(
    tmp_path_factory: pytest.TempPathFactory,
    toy_checkpoint: Callable[..., Path],
    fine_folder: Path,
    calibration_folder: Path,
) -> Calibrated:
    """Three layers of the fine model with 8 of their 32 experts."""
    folder = tmp_path_factory.mktemp("layers")
    source = open_source(toy_checkpoint(folder, n_layers=3))
    student = Student(source, ExpertMap.keeping(32, [tuple(range(first, 32, 4)) for first in range(3)]))
    tokens_BT = tokenize(read_splits(calibration_folder, None), fine_folder)[0].spread(2).tokens_BT
    return Calibrated(student, tokens_BT, folder / "inputs")


@pytest.fixture(scope="module")
def untied(
    tmp_path_factory: pytest.TempPathFactory, olmoe_folder: Path, fine_folder: Path, calibration_folder: Path
) -> Calibrated:
    """A model whose head is not its embedding, with 12 of its 16 experts."""
    student = Student(
        open_source(olmoe_folder), ExpertMap.keeping(16, [tuple(range(first, 12 + first)) for first in range(3)])
    )
    tokens_BT = tokenize(read_splits(calibration_folder, None), fine_folder)[0].spread(2).tokens_BT
    return Calibrated(student, tokens_BT, tmp_path_factory.mktemp("untied") / "inputs")


@pytest.fixture(params=["gguf", "onnx"])
def artifact(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _whole(artifact: str, student: Student, folder: Path, **arguments: Any) -> tuple[Weights, int]:
    """The whole file's numbers, and the bytes of its folder."""
    folder.mkdir()
    weights: Weights
    if artifact == "gguf":
        write_gguf(student, _MIX, folder / "x.gguf", name="x", threads=1, **arguments)
        weights = GgufWeights(folder / "x.gguf", student.spec)
    else:
        write_onnx(student, _MIX, folder, threads=1, **arguments)
        weights = OnnxWeights(folder, student.spec)
    return weights, _bytes_on_disk(folder)


def _by_layer(artifact: str, student: Student, folder: Path, **arguments: Any) -> LayerByLayer:
    folder.mkdir()
    make = gguf_by_layer if artifact == "gguf" else onnx_by_layer
    return make(student, _MIX, folder, threads=2, **arguments)


def _bytes_on_disk(folder: Path) -> int:
    return sum(512 * file.stat().st_blocks for file in folder.rglob("*") if file.is_file())


def _values(student: Student, weights: Weights, layer: int | None) -> Iterator[torch.Tensor]:
    """All values of a layer, or of what belongs to none."""
    held = student.as_written(weights)
    if layer is None:
        yield from (held.tensor(tensor.role) for tensor in held.spec.written.tensors)
        return
    described = held.spec.layers[layer]
    yield from (held.tensor(tensor.role, layer) for tensor in described.shared_tensors)
    for tensor in described.expert_tensors:
        yield from (held.expert(tensor.role, layer, expert) for expert in range(described.n_experts))


def _check_same(student: Student, one: LayerByLayer, whole: Weights) -> None:
    for layer in (0, 1, 2, 1, None):
        one.write(layer)
        pairs = zip(_values(student, one, layer), _values(student, whole, layer), strict=True)
        assert all(torch.equal(value, expected) for value, expected in pairs)


@pytest.mark.parametrize("quantizer", ["kernel", "feedback"])
def test_it_holds_the_numbers_of_the_whole_file(
    calibrated: Calibrated, tmp_path: Path, artifact: str, quantizer: str
) -> None:
    student = calibrated.student

    def arguments() -> dict[str, Any]:
        feedback = calibrated.feedback() if quantizer == "feedback" else None
        return {"feedback": feedback, "importance": calibrated.importance}

    whole, _ = _whole(artifact, student, tmp_path / "whole", **arguments())
    _check_same(student, _by_layer(artifact, student, tmp_path / "layers", **arguments()), whole)


def test_experts_on_bases_are_those_of_the_whole_file(toy_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    student = student_on_bases(toy_checkpoint(tmp_path, n_layers=3), [None, *(0, 1) * 15, None], 4)
    whole, _ = _whole("onnx", student, tmp_path / "whole")
    _check_same(student, _by_layer("onnx", student, tmp_path / "layers"), whole)


def test_no_more_than_a_layer_lies_on_the_disk(calibrated: Calibrated, tmp_path: Path, artifact: str) -> None:
    student, folder = calibrated.student, tmp_path / "layers"
    _, n_bytes = _whole(artifact, student, tmp_path / "whole")
    weights = _by_layer(artifact, student, folder)
    outside = _bytes_on_disk(folder)
    of_layer = (n_bytes - outside) / 3
    for layer in range(3):
        weights.write(layer)
        taken = _bytes_on_disk(folder) - outside
        assert of_layer - _PAGES < taken < of_layer + _PAGES
    with pytest.raises(AssertionError, match="layer 0 is not what is there"):
        list(_values(student, weights, 0))


def test_it_is_judged_as_the_whole_file_is(
    calibrated: Calibrated, tokens_and_teacher: tuple[torch.Tensor, LogProbReader], tmp_path: Path, artifact: str
) -> None:
    student, (tokens_BT, teacher) = calibrated.student, tokens_and_teacher
    whole, _ = _whole(artifact, student, tmp_path / "whole")
    weights, seen = _by_layer(artifact, student, tmp_path / "layers"), []
    of_whole = judge(student.as_written(whole), tokens_BT, teacher, _SCORED)
    found = judge(student.as_written(weights), tokens_BT, teacher, _SCORED, seen.append, write=weights.write)
    assert found == of_whole
    assert found.divergence > 0 and seen == [1, 1, 1]


def test_the_head_is_there_when_it_is_asked_for(untied: Calibrated, tmp_path: Path, artifact: str) -> None:
    student = untied.student
    whole, _ = _whole(artifact, student, tmp_path / "whole")
    weights = _by_layer(artifact, student, tmp_path / "layers")
    weights.write(2)
    with pytest.raises(AssertionError, match="the head is not what is there"):
        weights.rows(Role.HEAD, None, slice(0, 1))
    _check_same(student, weights, whole)
    with pytest.raises(AssertionError, match="layer 2 is not what is there"):
        list(_values(student, weights, 2))


@pytest.mark.parametrize(("name", "n_passes"), [("untied", 1), ("calibrated", 2)])  # a tied head is needed at once
def test_its_codes_are_chosen_by_inputs_that_pass_by(
    request: pytest.FixtureRequest, tmp_path: Path, artifact: str, name: str, n_passes: int
) -> None:
    of_model: Calibrated = request.getfixturevalue(name)
    student, tokens_BT = of_model.student, of_model.tokens_BT
    whole, _ = _whole(artifact, student, tmp_path / "whole", feedback=of_model.feedback())
    model, passes = StreamedModel(student), []
    first_states = model.first_states
    model.first_states = lambda *given, **named: passes.append(1) or first_states(*given, **named)  # type: ignore
    moments = SecondMoments(student, PassingInputs(model, tokens_BT))
    feedback = StudentFeedback(moments, tied=student.spec.tied_embeddings)
    weights = _by_layer(artifact, student, tmp_path / "layers", feedback=feedback)
    for layer in (0, 1, 2, None):
        weights.write(layer)
        pairs = zip(_values(student, weights, layer), _values(student, whole, layer), strict=True)
        assert all(torch.equal(value, expected) for value, expected in pairs)
    assert len(passes) == n_passes


@pytest.fixture(scope="module")
def tokens_and_teacher(
    calibrated: Calibrated, fine_folder: Path, calibration_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.Tensor, LogProbReader]:
    """Two blocks, and what the student says of them in its own numbers."""
    tokens_BT = tokenize(read_splits(calibration_folder, None), fine_folder)[0].spread(5).tokens_BT[1:3]
    folder, student = tmp_path_factory.mktemp("teacher"), calibrated.student
    model = StreamedModel(student)
    (hidden,) = model.stream([TokenGroup(tokens_BT)])
    writer = LogProbWriter(folder, len(tokens_BT) * (_SCORED.stop - _SCORED.start), student.spec.vocab_size)
    for positions, logits in model.logits_in_chunks(hidden, _SCORED):
        writer.write(positions.start, logits)
    return tokens_BT, LogProbReader(folder)


def test_a_full_disk_is_told(calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _by_layer("gguf", calibrated.student, tmp_path / "layers")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(layer_by_layer, "write_at", full)
    with pytest.raises(InputError, match=r"weights\.gguf.*make room"):
        weights.write(1)
