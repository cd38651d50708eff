"""One pass over text, against stock transformers and numpy in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.model.errors import InputError
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.predictions.routing_record import RoutingRecord
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from validate.metrics.evaluation import AgainstReference, Evaluation, evaluate
from validate.runtimes.backend import scored_positions
from validate.runtimes.torch import TorchBackend

_CODING_STEP = 16 / 65535  # nats: log-probabilities on disk are at most half of this off

Floats = npt.NDArray[np.float64]


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
    return Student(open_source(toy), ExpertMap.keeping(32, (tuple(range(12)), tuple(range(20, 32)))))


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
    evaluation = evaluate(TorchBackend(Student.teacher(open_source(toy))), chunks_BT, {}, record=writer)
    return evaluation, folder


def test_likelihoods_equal_stock_transformers(
    recorded: tuple[Evaluation, Path], teacher_log_probs: Floats, chunks_BT: npt.NDArray[np.int64]
) -> None:
    targets = chunks_BT[:, 33:64]
    expected = -np.take_along_axis(teacher_log_probs, targets[..., None], -1).ravel()
    evaluation, _ = recorded
    assert evaluation.negative_log_likelihood_N.shape == (93,)
    np.testing.assert_allclose(evaluation.negative_log_likelihood_N, expected, atol=1e-4)
    assert evaluation.against == {}
    assert evaluation.n_chunks == 3
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
    np.testing.assert_allclose(
        evaluation.against["teacher"].kl_divergence_N, expected, atol=2 * _CODING_STEP, rtol=1e-3
    )
    of_teacher = -np.take_along_axis(teacher_log_probs, chunks_BT[:, 33:64, None], -1).ravel()
    np.testing.assert_allclose(evaluation.against["teacher"].negative_log_likelihood_N, of_teacher, atol=_CODING_STEP)
    same_top = (teacher_log_probs.argmax(-1) == log_probs.argmax(-1)).ravel()
    assert 0.0 < same_top.mean() < 1.0
    assert (evaluation.against["teacher"].same_top_N == same_top).all()


def test_a_model_does_not_diverge_from_its_own_recording(
    toy: Path, chunks_BT: npt.NDArray[np.int64], recorded: tuple[Evaluation, Path]
) -> None:
    first, folder = recorded
    progress: list[int] = []
    again = evaluate(
        TorchBackend(Student.teacher(open_source(toy))),
        chunks_BT,
        {"itself": LogProbReader(folder)},
        progress=progress.append,
    )
    assert np.abs(again.against["itself"].kl_divergence_N).max() < _CODING_STEP
    assert again.against["itself"].same_top_N.all()
    assert np.array_equal(again.negative_log_likelihood_N, first.negative_log_likelihood_N)
    assert progress == [1, 1, 1]
    without_a_run = first.beside_itself("itself").against["itself"]
    for field, measured in vars(again.against["itself"]).items():
        np.testing.assert_allclose(getattr(without_a_run, field), measured, atol=_CODING_STEP)


def test_a_reference_in_another_order_is_noticed(
    toy: Path, chunks_BT: npt.NDArray[np.int64], recorded: tuple[Evaluation, Path]
) -> None:
    """Were the rows not those of the same chunk, the divergence could not be small."""
    reversed_chunks = np.ascontiguousarray(chunks_BT[::-1])
    reference = {"teacher": LogProbReader(recorded[1])}
    evaluation = evaluate(TorchBackend(Student.teacher(open_source(toy))), reversed_chunks, reference)
    assert evaluation.against["teacher"].kl_divergence_N.mean() > 0.5


def _values(generator: np.random.Generator) -> AgainstReference:
    floats = generator.random((2, 5), np.float32)
    return AgainstReference(floats[0], generator.random(5) > 0.5, floats[1], generator.random(5) > 0.5)


def test_save_and_load(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    saved = Evaluation(
        5,
        generator.random(5, np.float32),
        {"teacher": _values(generator), "gguf": _values(generator)},
        RoutingRecord(generator.integers(0, 8, (2, 10, 2), np.int32), generator.random((2, 10, 2), np.float32)),
        generator.random(5) > 0.5,
    )
    saved.save(tmp_path / "evaluation.safetensors")
    loaded = Evaluation.load(tmp_path / "evaluation.safetensors")
    assert loaded.n_chunks == 5
    assert np.array_equal(loaded.negative_log_likelihood_N, saved.negative_log_likelihood_N)
    assert np.array_equal(loaded.right_N, saved.right_N)
    assert set(loaded.against) == {"teacher", "gguf"}
    for name, expected in saved.against.items():
        for field, values in vars(expected).items():
            found = getattr(loaded.against[name], field)
            assert found.dtype == values.dtype
            assert np.array_equal(found, values)
    assert np.array_equal(loaded.routing.experts_LTK, saved.routing.experts_LTK)
    assert np.array_equal(loaded.routing.weights_LTK, saved.routing.weights_LTK)


def test_save_and_load_without_routing(tmp_path: Path) -> None:
    Evaluation(1, np.ones(3, np.float32), {}, None, np.ones(3, np.bool_)).save(tmp_path / "dense.safetensors")
    loaded = Evaluation.load(tmp_path / "dense.safetensors")
    assert loaded.routing is None
    assert np.array_equal(loaded.negative_log_likelihood_N, np.ones(3, np.float32))


def test_a_reference_of_another_vocabulary_is_refused(
    toy: Path, chunks_BT: npt.NDArray[np.int64], tmp_path: Path
) -> None:
    writer = LogProbWriter(tmp_path / "other", 3 * 31, 100)
    writer.write(0, torch.zeros(3 * 31, 100))
    backend = TorchBackend(Student.teacher(open_source(toy)))
    with pytest.raises(InputError, match=r"a vocabulary of 100 and the model one of 4,096"):
        evaluate(backend, chunks_BT, {"other": LogProbReader(tmp_path / "other")})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.safetensors"
    with pytest.raises(InputError, match=r"evaluation\.safetensors cannot be read"):
        Evaluation.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"evaluation\.safetensors cannot be read"):
        Evaluation.load(path)
