"""Predictions that are kept as the inputs of the head give the log-probabilities that keeping these would give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressors.calibration.teacher import write_predictions
from compressors.model.errors import InputError
from compressors.model.predictions import head_inputs
from compressors.model.predictions.head_inputs import HeadInputs, RemadeLogProbs, finished_logits
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from validate.runtimes.torch import TorchBackend

_SCORED = slice(16, 31)


@pytest.fixture(scope="module", params=["fine", "olmoe"])
def teacher(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]
) -> Student:
    """One layer with a tied head, and with a head of its own."""
    folder = toy_checkpoint(tmp_path_factory.mktemp("toy"), n_layers=1, model=request.param)
    return Student.teacher(open_source(folder))


@pytest.fixture(scope="module")
def tokens_BT() -> torch.Tensor:
    return torch.randint(4096, (5, 32), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def kept(teacher: Student, tokens_BT: torch.Tensor, tmp_path: Path) -> HeadInputs:
    model = StreamedModel(teacher)
    (hidden,) = model.stream([TokenGroup(tokens_BT)])
    inputs = HeadInputs.create(tmp_path / "kept" / "inputs.npy", 5 * 15, teacher.spec.hidden_size)
    likelihoods = write_predictions(model, tokens_BT, hidden, _SCORED, inputs, range(5))
    logits = RemadeLogProbs(inputs, teacher).logits(0, 75)
    expected = torch.nn.functional.cross_entropy(logits, tokens_BT[:, 17:32].flatten(), reduction="none")
    torch.testing.assert_close(likelihoods, expected)
    return inputs


def test_they_give_what_keeping_log_probabilities_would(
    teacher: Student, tokens_BT: torch.Tensor, kept: HeadInputs, tmp_path: Path
) -> None:
    """The products are those of the same positions with the same matrix, so no bit differs."""
    model = StreamedModel(teacher)
    (hidden,) = model.stream([TokenGroup(tokens_BT)])
    writer = LogProbWriter(tmp_path / "log_probs", 75, teacher.spec.vocab_size)
    for part, logits in model.logits_in_chunks(hidden, _SCORED):
        writer.write(part.start, logits)
    stored, remade = LogProbReader(tmp_path / "log_probs"), RemadeLogProbs(kept, teacher)
    assert len(remade) == len(stored) == 75
    assert torch.equal(remade.decoded(0, 75), stored.decoded(0, 75))
    assert torch.equal(remade.rows(0, 75), stored.rows(0, 75))
    assert torch.isneginf(remade.rows(0, 75)).any() or remade.rows(0, 75).min() > -17


def test_who_asks_for_what_changes_no_bit(teacher: Student, kept: HeadInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_inputs, "_VALUES_AT_ONCE", 8 * teacher.spec.vocab_size)
    remade = RemadeLogProbs(kept, teacher)
    whole = remade.decoded(0, 75).clone()
    pieces = [(0, 1), (1, 20), (20, 40), (40, 41), (41, 75)]
    assert torch.equal(torch.cat([remade.decoded(*piece) for piece in pieces]), whole)
    backwards = [remade.decoded(start, stop) for start, stop in reversed(pieces)]
    assert torch.equal(torch.cat(backwards[::-1]), whole)
    remade.decoded(3, 5).zero_()
    assert torch.equal(remade.decoded(0, 75), whole), "what is given away is a copy"


def test_torch_keeps_them_while_it_is_measured(
    teacher: Student, tokens_BT: torch.Tensor, kept: HeadInputs, tmp_path: Path
) -> None:
    again = HeadInputs.create(tmp_path / "again.npy", 75, teacher.spec.hidden_size)
    chunks = list(TorchBackend(teacher, kept=again).run(tokens_BT.numpy()))
    assert torch.equal(again.read(0, 75), kept.read(0, 75))
    logits = RemadeLogProbs(again, teacher).logits(30, 45)
    torch.testing.assert_close(logits, torch.from_numpy(chunks[2].logits_SV), rtol=1e-5, atol=1e-5)


def test_a_divisor_and_a_cap_are_those_of_the_model(teacher: Student) -> None:
    products = torch.tensor([[-30.0, 0.0, 8.0]])
    spec = replace(teacher.spec, logit_divisor=4.0, logit_cap=5.0)
    assert torch.equal(finished_logits(products, spec), 5.0 * torch.tanh(torch.tensor([[-1.5, 0.0, 0.4]])))
    assert torch.equal(finished_logits(products, replace(teacher.spec, logit_divisor=1.0)), products)


def test_another_model_s_are_refused(teacher: Student, tmp_path: Path) -> None:
    inputs = HeadInputs.create(tmp_path / "narrow.npy", 3, teacher.spec.hidden_size - 1)
    with pytest.raises(InputError, match="gather them again"):
        RemadeLogProbs(inputs, teacher)
    (tmp_path / "narrow.npy").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"the predictions in .*narrow\.npy cannot be read"):
        HeadInputs(tmp_path / "narrow.npy")
