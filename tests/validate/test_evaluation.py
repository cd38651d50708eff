"""Perplexity, divergence and one pass over text, against numpy in float64 and stock transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import InputError
from compressors.model.log_probs import LogProbReader, LogProbWriter
from compressors.model.routing import Routing
from compressors.model.student import ExpertMap, Student
from validate.backend import scored_positions
from validate.evaluation import Evaluation, divergence, evaluate, perplexity
from validate.torch_reference import TorchBackend

_CODING_STEP = 16 / 65535  # nats: log-probabilities on disk are at most half of this off

Floats = npt.NDArray[np.float64]


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    value, error = perplexity(np.full(40, np.log(4096), np.float32))
    assert value == pytest.approx(4096, rel=1e-6)
    assert error == 0.0


def test_perplexity_and_its_error_by_hand() -> None:
    """Mean 2, variance (1 + 0 + 1) / 3, error of the mean sqrt(2/3 / 2); the perplexity's is exp(2) times that."""
    value, error = perplexity(np.array([1.0, 2.0, 3.0], np.float32))
    assert value == pytest.approx(7.38905609893065)
    assert error == pytest.approx(7.38905609893065 * np.sqrt(1 / 3))


def test_perplexity_of_one_position_has_no_error() -> None:
    value, error = perplexity(np.array([1.0], np.float32))
    assert value == pytest.approx(2.718281828459045)
    assert error == 0.0


def test_perplexity_sums_in_double_precision() -> None:
    """A million values of 5 with a tiny part that float32 sums would lose."""
    value, _ = perplexity(np.full(1_000_000, 5.000001, np.float32))
    assert value == pytest.approx(np.exp(float(np.float32(5.000001))), rel=1e-12)


def test_divergence_is_summarised_by_interpolated_percentiles() -> None:
    """0, 1, ..., 1000 in any order: percentile q is 10 q."""
    values = np.random.default_rng(0).permutation(1001).astype(np.float32)
    assert asdict(divergence(values)) == pytest.approx(
        {"mean": 500.0, "median": 500.0, "p90": 900.0, "p95": 950.0, "p99": 990.0, "p999": 999.0, "max": 1000.0}
    )
    assert divergence(np.array([0.0, 1.0], np.float32)).p90 == pytest.approx(0.9)


def test_scored_positions_are_llama_perplexity_s() -> None:
    """The second half, without the last position, whose next token is not there: 255 of 512."""
    assert scored_positions(512) == slice(256, 511)
    assert scored_positions(8) == slice(4, 7)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("evaluation"), n_layers=2)


@pytest.fixture(scope="module")
def chunks_BT(heldout_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return heldout_tokens[: 3 * 64].reshape(3, 64)


def _pruned(toy: Path) -> Student:
    return Student(Checkpoint(toy), ExpertMap.keeping(32, (tuple(range(12)), tuple(range(20, 32)))))


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


@torch.no_grad()
def _stock_log_probs(toy: Path, chunks_BT: npt.NDArray[np.int64], student: Student | None = None) -> Floats:
    """Log-probabilities [B, 31, V] at the scored positions 32 ... 62, by stock transformers and numpy."""
    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32).eval()
    if student is not None:
        for kept, layer in zip(student.experts.kept, model.model.layers, strict=True):
            block = layer.mlp
            block.gate.weight.data = block.gate.weight.data[list(kept)]
            block.experts.gate_up_proj.data = block.experts.gate_up_proj.data[list(kept)]
            block.experts.down_proj.data = block.experts.down_proj.data[list(kept)]
            block.gate.num_experts = block.experts.num_experts = len(kept)
    logits = model(torch.from_numpy(chunks_BT)).logits.double().numpy()
    return _log_softmax(logits[:, 32:63])


@pytest.fixture(scope="module")
def teacher_log_probs(toy: Path, chunks_BT: npt.NDArray[np.int64]) -> Floats:
    return _stock_log_probs(toy, chunks_BT)


@pytest.fixture(scope="module")
def recorded(
    toy: Path, chunks_BT: npt.NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluation, Path]:
    """The teacher's evaluation, and its recorded log-probabilities."""
    folder = tmp_path_factory.mktemp("recorded") / "log_probs"
    writer = LogProbWriter(folder, 3 * 31, 4096)
    evaluation = evaluate(TorchBackend(Student.teacher(Checkpoint(toy))), chunks_BT, {}, record=writer)
    return evaluation, folder


def test_likelihoods_equal_stock_transformers(
    recorded: tuple[Evaluation, Path], teacher_log_probs: Floats, chunks_BT: npt.NDArray[np.int64]
) -> None:
    targets = chunks_BT[:, 33:64]
    expected = -np.take_along_axis(teacher_log_probs, targets[..., None], -1).ravel()
    evaluation, _ = recorded
    assert evaluation.negative_log_likelihood_N.shape == (93,)
    np.testing.assert_allclose(evaluation.negative_log_likelihood_N, expected, atol=1e-4)
    assert evaluation.kl_divergence_N == {}
    assert evaluation.routing.experts_LTK.shape == (2, 192, 4), "routing is kept at every position, scored or not"


def test_what_was_recorded_is_what_the_model_said(recorded: tuple[Evaluation, Path], teacher_log_probs: Floats) -> None:
    rows = LogProbReader(recorded[1]).rows(0, 93).numpy()
    expected = teacher_log_probs.reshape(93, 4096)
    possible = np.isfinite(rows)
    np.testing.assert_allclose(rows[possible], expected[possible], atol=_CODING_STEP)
    impossible = expected[~possible]
    assert (impossible <= np.repeat(expected.max(-1), (~possible).sum(-1)) - 16 + 2 * _CODING_STEP).all()


def test_divergence_from_a_reference_equals_stock_transformers(
    toy: Path, chunks_BT: npt.NDArray[np.int64], recorded: tuple[Evaluation, Path], teacher_log_probs: Floats
) -> None:
    student = _pruned(toy)
    evaluation = evaluate(TorchBackend(student), chunks_BT, {"teacher": LogProbReader(recorded[1])})
    log_probs = _stock_log_probs(toy, chunks_BT, student)
    expected = (np.exp(teacher_log_probs) * (teacher_log_probs - log_probs)).sum(-1).ravel()
    assert expected.mean() > 0.01, "the student differs"
    # p log p and the sum of p, both from log-probabilities half a step off
    np.testing.assert_allclose(evaluation.kl_divergence_N["teacher"], expected, atol=2 * _CODING_STEP, rtol=1e-3)
    same_top = (teacher_log_probs.argmax(-1) == log_probs.argmax(-1)).ravel()
    assert 0.0 < same_top.mean() < 1.0
    assert (evaluation.same_top_N["teacher"] == same_top).all()


def test_a_model_does_not_diverge_from_its_own_recording(
    toy: Path, chunks_BT: npt.NDArray[np.int64], recorded: tuple[Evaluation, Path]
) -> None:
    first, folder = recorded
    progress: list[int] = []
    again = evaluate(
        TorchBackend(Student.teacher(Checkpoint(toy))),
        chunks_BT,
        {"itself": LogProbReader(folder)},
        progress=progress.append,
    )
    assert np.abs(again.kl_divergence_N["itself"]).max() < _CODING_STEP
    assert again.same_top_N["itself"].all()
    assert np.array_equal(again.negative_log_likelihood_N, first.negative_log_likelihood_N)
    assert progress == [1, 1, 1]


def test_a_reference_in_another_order_is_noticed(
    toy: Path, chunks_BT: npt.NDArray[np.int64], recorded: tuple[Evaluation, Path]
) -> None:
    """Were the rows not those of the same chunk, the divergence could not be small."""
    reversed_chunks = np.ascontiguousarray(chunks_BT[::-1])
    reference = {"teacher": LogProbReader(recorded[1])}
    evaluation = evaluate(TorchBackend(Student.teacher(Checkpoint(toy))), reversed_chunks, reference)
    assert evaluation.kl_divergence_N["teacher"].mean() > 0.5


def test_save_and_load(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    saved = Evaluation(
        generator.random(5, np.float32),
        {"teacher": generator.random(5, np.float32), "gguf": generator.random(5, np.float32)},
        {"teacher": generator.random(5) > 0.5, "gguf": generator.random(5) > 0.5},
        Routing(generator.integers(0, 8, (2, 7, 2), np.int32), generator.random((2, 7, 2), np.float32)),
    )
    saved.save(tmp_path / "evaluation.safetensors")
    loaded = Evaluation.load(tmp_path / "evaluation.safetensors")
    assert np.array_equal(loaded.negative_log_likelihood_N, saved.negative_log_likelihood_N)
    assert set(loaded.kl_divergence_N) == set(loaded.same_top_N) == {"teacher", "gguf"}
    for name in ("teacher", "gguf"):
        assert np.array_equal(loaded.kl_divergence_N[name], saved.kl_divergence_N[name])
        assert np.array_equal(loaded.same_top_N[name], saved.same_top_N[name])
        assert loaded.same_top_N[name].dtype == np.bool_
    assert np.array_equal(loaded.routing.experts_LTK, saved.routing.experts_LTK)
    assert np.array_equal(loaded.routing.weights_LTK, saved.routing.weights_LTK)


def test_save_and_load_without_routing(tmp_path: Path) -> None:
    Evaluation(np.ones(3, np.float32), {}, {}, None).save(tmp_path / "dense.safetensors")
    loaded = Evaluation.load(tmp_path / "dense.safetensors")
    assert loaded.routing is None
    assert np.array_equal(loaded.negative_log_likelihood_N, np.ones(3, np.float32))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.safetensors"
    with pytest.raises(InputError, match=r"evaluation\.safetensors cannot be read"):
        Evaluation.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"evaluation\.safetensors cannot be read"):
        Evaluation.load(path)
