"""Files whose codes are chosen by error feedback: the same bytes every time, and much nearer to the original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from compressors.calibration.layer_inputs import write_layer_inputs
from compressors.calibration.second_moments import SecondMoments
from compressors.calibration.splits import read_splits, tokenize
from compressors.model.description.roles import Role
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.quantize import dequantize_rows
from compressors.quantize.feedback import quantize_rows_with_feedback
from compressors.quantize.kernels import quantize_rows
from exporter.writing import pieces
from exporter.writing.feedback import EmbeddingGradient
from exporter.writing.feedback_memory import least_feedback_bytes, threads_within
from exporter.writing.gguf.writer import predict_file_size, write_gguf
from tests.altered import altered
from tests.exporter.calibrated import Calibrated

_N_BLOCKS = 4


def _write(calibrated: Calibrated, path: Path, threads: int = 1, **arguments: Any) -> None:
    arguments = {"feedback": calibrated.feedback(threads), "importance": calibrated.importance} | arguments
    write_gguf(calibrated.student, "Q4_0", path, name="x", threads=threads, **arguments)


@pytest.fixture(scope="module")
def tokens_BT(fine_folder: Path, calibration_folder: Path) -> torch.Tensor:
    return tokenize(read_splits(calibration_folder, None), fine_folder)[0].spread(_N_BLOCKS).tokens_BT


@pytest.fixture(scope="module")
def calibrated(
    tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path], tokens_BT: torch.Tensor
) -> Calibrated:
    """Two layers of the fine model with 8 of their 32 experts."""
    folder = tmp_path_factory.mktemp("feedback")
    source = open_source(toy_checkpoint(folder, n_layers=2))
    student = Student(source, ExpertMap.keeping(32, (tuple(range(0, 32, 4)), tuple(range(31, 0, -4)))))
    return Calibrated(student, tokens_BT, folder / "inputs")


@pytest.fixture(scope="module")
def written(calibrated: Calibrated, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "x.gguf"
    _write(calibrated, path)
    return path


def test_size_is_predicted_to_the_byte(calibrated: Calibrated, written: Path) -> None:
    student = calibrated.student
    assert written.stat().st_size == predict_file_size(student.spec, student.source, "Q4_0", "x")


def test_threads_change_no_byte(calibrated: Calibrated, written: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    _write(calibrated, tmp_path / "x.gguf", threads=3)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert (tmp_path / "x.gguf").read_bytes() == written.read_bytes()


@pytest.mark.parametrize("n_pieces", [3, 20])
def test_an_interrupted_file_is_the_same(
    calibrated: Calibrated, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_pieces: int
) -> None:
    """Killed after some pieces, among them experts, whose parts lie far ahead of what is still missing."""
    done: list[int] = []

    def progress(_n_bytes: int) -> None:
        done.append(_n_bytes)
        if len(done) == n_pieces + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(pieces, "_AHEAD_BYTES", 0)
    with pytest.raises(KeyboardInterrupt):
        _write(calibrated, tmp_path / "x.gguf", resume=True, progress=progress)
    assert (tmp_path / "x.gguf.journal").exists()
    again: list[int] = []
    _write(calibrated, tmp_path / "x.gguf", resume=True, progress=again.append)
    assert again[0] == sum(done) and sum(again) == written.stat().st_size
    assert (tmp_path / "x.gguf").read_bytes() == written.read_bytes()


def _stored(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_every_matrix_has_the_codes_that_its_own_inputs_ask_for(calibrated: Calibrated, written: Path) -> None:
    student, stored = calibrated.student, _stored(written)
    feedback = calibrated.feedback()
    attention = {Role.QUERY: "q", Role.KEY: "k", Role.VALUE: "v", Role.ATTENTION_OUTPUT: "output"}
    for layer in range(2):
        experts = feedback.experts(layer)
        for expert in (0, 5):
            gate, up = (student.expert(role, layer, expert) for role in (Role.EXPERT_GATE, Role.EXPERT_UP))
            of_expert = [experts.gate_up(expert)] * 2 + [experts.down(expert, gate, up)]
            for role, name, of in zip(
                (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN), ("gate", "up", "down"), of_expert, strict=True
            ):
                tensor, weights = stored[f"blk.{layer}.ffn_{name}_exps.weight"], calibrated.importance[role, layer]
                values = student.expert(role, layer, expert)
                expected = quantize_rows_with_feedback(values, tensor.tensor_type, weights[expert], of, name=name)
                np.testing.assert_array_equal(tensor.data[expert], expected)
        for role, name in attention.items():
            of_matrix = feedback.matrix(role, layer)
            assert of_matrix is not None
            tensor = stored[f"blk.{layer}.attn_{name}.weight"]
            expected = quantize_rows_with_feedback(
                student.tensor(role, layer),
                tensor.tensor_type,
                calibrated.importance[role, layer],
                of_matrix,
                name=name,
            )
            np.testing.assert_array_equal(tensor.data, expected)
    norm = student.tensor(Role.ATTENTION_NORM, 1).float().numpy()
    np.testing.assert_array_equal(stored["blk.1.attn_norm.weight"].data, norm)


def test_outputs_are_nearer_to_the_original_s_on_other_text(
    calibrated: Calibrated, written: Path, tmp_path: Path, heldout_folder: Path
) -> None:
    """On text that the codes were not chosen for: experts' outputs err much less than with the kernel's codes."""
    _write(calibrated, tmp_path / "kernel.gguf", feedback=None)
    student, source = calibrated.student, calibrated.student.source
    held_BT = tokenize(read_splits(heldout_folder, None), source.tokenizer_folder)[0].spread(_N_BLOCKS).tokens_BT
    held = write_layer_inputs(StreamedModel(student), held_BT, tmp_path / "held")
    experts = SecondMoments(student, held).layer(1).experts
    assert experts is not None
    errors = {"x": 0.0, "kernel": 0.0}
    for name, path in (("x", written), ("kernel", tmp_path / "kernel.gguf")):
        tensor = _stored(path)["blk.1.ffn_gate_exps.weight"]
        for expert in range(8):
            restored = torch.from_numpy(dequantize_rows(tensor.data[expert], tensor.tensor_type, 256))
            error = student.expert(Role.EXPERT_GATE, 1, expert).float() - restored
            errors[name] += float((error @ experts.gate_up(expert).mean_NN * error).sum())
    assert errors["x"] < 0.6 * errors["kernel"]


def test_the_tied_embedding_errs_in_both_its_uses(calibrated: Calibrated, tmp_path: Path) -> None:
    """Weighs by its gradient alone and with the head's share: each lowers its own error."""
    student = calibrated.student
    values = student.tensor(Role.TOKEN_EMBEDDING).float()
    gradient_DD = torch.cov(torch.randn(40, 256, generator=torch.Generator().manual_seed(2)).T)
    head_DD = SecondMoments(student, calibrated.inputs).head().mean_NN

    def errors(kappa: float) -> tuple[float, float]:
        path = tmp_path / f"{kappa}.gguf"
        _write(calibrated, path, feedback=calibrated.feedback(gradient=EmbeddingGradient(gradient_DD, kappa)))
        tensor = _stored(path)["token_embd.weight"]
        error = values - torch.from_numpy(dequantize_rows(tensor.data, tensor.tensor_type, 256))
        return float((error @ gradient_DD * error).sum()), float((error @ head_DD * error).sum())

    scale = float(gradient_DD.trace() / head_DD.trace())
    lookup_only, both, head_only = (errors(kappa) for kappa in (0.0, scale, 1e6 * scale))
    assert lookup_only[0] < both[0] < head_only[0]
    assert lookup_only[1] > both[1] > head_only[1]


def test_a_head_of_its_own_gets_feedback_and_its_embedding_none(
    toy_checkpoint: Callable[..., Path], tmp_path: Path, tokens_BT: torch.Tensor
) -> None:
    student = Student(open_source(toy_checkpoint(tmp_path, 1, "olmoe")), ExpertMap(16, (LayerMap(0, ((3,), (5,))),)))
    calibrated = Calibrated(student, tokens_BT[:2], tmp_path / "inputs")
    _write(calibrated, tmp_path / "x.gguf")
    stored = _stored(tmp_path / "x.gguf")
    for name, role, changes in (("token_embd", Role.TOKEN_EMBEDDING, False), ("output", Role.HEAD, True)):
        tensor = stored[f"{name}.weight"]
        kernel = quantize_rows(student.tensor(role), tensor.tensor_type, name=name)
        assert bool((tensor.data != kernel).any()) is changes


def test_memory_decides_how_many_threads_choose_codes(calibrated: Calibrated) -> None:
    olmoe = altered(
        calibrated.student.spec, hidden_size=2048, n_heads=16, n_kv_heads=16, head_dim=128, n_experts=64, top_k=8,
        expert_width=1024,
    )  # fmt: skip
    least = least_feedback_bytes(olmoe)
    assert 4 * 6 * 2048**2 < least < 1_000_000_000
    assert [threads_within(n_bytes, olmoe, 16) for n_bytes in (-1, least, 10**10)] == [1, 1, 16]
    threads = [threads_within(n_bytes, olmoe, 16) for n_bytes in range(least, 5 * 10**9, 10**8)]
    assert threads == sorted(threads) and set(threads) == set(range(1, 17))
