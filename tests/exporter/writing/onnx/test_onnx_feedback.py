"""ONNX files whose codes are chosen by error feedback: the same bytes every time, and nearer to the original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressors.calibration.layer_inputs import write_layer_inputs
from compressors.calibration.second_moments import SecondMoments
from compressors.calibration.splits import read_splits, tokenize
from compressors.model.description.roles import Role
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import ExpertMap, Student
from compressors.quantize.feedback import quantize_blocks_with_feedback
from exporter.writing import pieces
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE
from exporter.writing.onnx.writer import predict_size, write_onnx
from tests.exporter.calibrated import Calibrated

_N_BLOCKS = 4
_PRESET = "Q4_0"
_ENCODINGS = {"layers.1.experts": "4@128"}  # beside a layer whose codes ggml's kernels begin with


def _write(calibrated: Calibrated, folder: Path, threads: int = 1, **arguments: Any) -> None:
    arguments = {"feedback": calibrated.feedback(threads), "importance": calibrated.importance} | arguments
    write_onnx(calibrated.student, _PRESET, folder, encodings=_ENCODINGS, threads=threads, **arguments)


def _read(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (MODEL_FILE, DATA_FILE)]


@pytest.fixture(scope="module")
def calibrated(
    tmp_path_factory: pytest.TempPathFactory,
    toy_checkpoint: Callable[..., Path],
    fine_folder: Path,
    calibration_folder: Path,
) -> Calibrated:
    """Two layers of the fine model with 6 of their 32 experts."""
    folder = tmp_path_factory.mktemp("feedback")
    student = Student(
        Checkpoint(toy_checkpoint(folder)), ExpertMap.keeping(32, ((1, 3, 8, 10, 11, 30), tuple(range(6))))
    )
    tokens_BT = tokenize(read_splits(calibration_folder, None), fine_folder)[0].spread(_N_BLOCKS).tokens_BT
    return Calibrated(student, tokens_BT, folder / "inputs")


@pytest.fixture(scope="module")
def written(calibrated: Calibrated, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    _write(calibrated, folder)
    return folder


def test_size_is_predicted_to_the_byte(calibrated: Calibrated, written: Path) -> None:
    n_bytes = sum(len(content) for content in _read(written))
    assert n_bytes == predict_size(calibrated.student.spec, _PRESET, encodings=_ENCODINGS)


def test_threads_change_no_byte(calibrated: Calibrated, written: Path, tmp_path: Path) -> None:
    _write(calibrated, tmp_path, threads=2)
    assert _read(tmp_path) == _read(written)


def test_an_interrupted_file_is_the_same(
    calibrated: Calibrated, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed amid the first layer's experts, both of whose weights have parts of which the file has later ones."""
    done: list[int] = []

    def progress(n_bytes: int) -> None:
        done.append(n_bytes)
        if len(done) == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(pieces, "_AHEAD_BYTES", 0)
    with pytest.raises(KeyboardInterrupt):
        _write(calibrated, tmp_path, resume=True, progress=progress)
    again: list[int] = []
    _write(calibrated, tmp_path, resume=True, progress=again.append)
    assert again[0] == sum(done) > 0
    assert _read(tmp_path) == _read(written)


def test_every_expert_has_the_codes_that_its_own_inputs_ask_for(calibrated: Calibrated, written: Path) -> None:
    student = calibrated.student
    restored = student.as_written(OnnxWeights(written, student.spec))
    experts = calibrated.feedback().experts(1)
    for expert in range(student.spec.n_experts):
        gate, up, down = (
            student.expert(role, 1, expert) for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
        )
        feedback = {Role.EXPERT_UP: experts.gate_up(expert), Role.EXPERT_DOWN: experts.down(expert, gate, up)}
        for role, values in ((Role.EXPERT_UP, up), (Role.EXPERT_DOWN, down)):
            weights = calibrated.importance[role, 1][expert]
            expected = quantize_blocks_with_feedback(values, 4, 128, feedback[role], weights, name="x").values()
            np.testing.assert_array_equal(restored.expert(role, 1, expert).numpy(), expected)


def test_outputs_are_nearer_to_the_original_s_on_other_text(
    calibrated: Calibrated, written: Path, tmp_path: Path, heldout_folder: Path
) -> None:
    """In both layers, on text that the codes were not chosen for."""
    _write(calibrated, tmp_path / "plain", feedback=None)
    student = calibrated.student
    held_BT = (
        tokenize(read_splits(heldout_folder, None), student.source.tokenizer_folder)[0].spread(_N_BLOCKS).tokens_BT
    )
    held = write_layer_inputs(StreamedModel(student), held_BT, tmp_path / "held")
    for layer in range(2):
        experts = SecondMoments(student, held).layer(layer).experts
        assert experts is not None
        errors = []
        for folder in (written, tmp_path / "plain"):
            restored = student.as_written(OnnxWeights(folder, student.spec))
            total = torch.zeros(())
            for expert in range(student.spec.n_experts):
                pair = (one.expert(Role.EXPERT_GATE, layer, expert).float() for one in (student, restored))
                error = torch.sub(*pair)
                total += (error @ experts.gate_up(expert).mean_NN * error).sum()
            errors.append(float(total))
        assert errors[0] < 0.7 * errors[1]
