"""Texts that a student writes, against stock transformers without a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.model.description.spec import NO_MOE
from compressors.model.errors import InputError
from compressors.model.predictions.next_token import draw_tokens, random_numbers
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.recover import sampling
from compressors.recover.sampling import sample_texts
from compressors.recover.scopes import Scope
from compressors.recover.text_cache import cache_bytes
from compressors.recover.trained_student import TrainedStudent
from tests.altered import altered

_N_NEW = 12


@pytest.fixture(scope="module")
def prompts_BP(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    """More than a layer takes at once."""
    return torch.from_numpy(heldout_tokens[: 10 * 16].reshape(10, 16))


@pytest.fixture(scope="module")
def uniform_BN() -> torch.Tensor:
    return torch.stack([random_numbers((5, text), _N_NEW) for text in range(10)])


def test_texts_equal_a_loop_that_reads_everything_again(
    family_folder: Path, prompts_BP: torch.Tensor, uniform_BN: torch.Tensor
) -> None:
    texts = sample_texts(StreamedModel(Student.teacher(open_source(family_folder))), prompts_BP, uniform_BN)
    stock = AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float32)
    expected = prompts_BP
    with torch.no_grad():
        for place in range(_N_NEW):
            logits_BV = stock(expected, use_cache=False).logits[:, -1]
            expected = torch.cat([expected, draw_tokens(logits_BV, uniform_BN[:, place])[:, None]], dim=1)
    assert torch.equal(texts, expected)
    assert len(texts[:, 16:].unique()) > 40


def test_each_token_is_drawn_from_the_model_s_own_logits(
    coarse_folder: Path, prompts_BP: torch.Tensor, uniform_BN: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def watched(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
        seen.append(logits_BV)
        return draw_tokens(logits_BV, uniform_B)

    monkeypatch.setattr(sampling, "draw_tokens", watched)
    texts = sample_texts(StreamedModel(Student.teacher(open_source(coarse_folder))), prompts_BP, uniform_BN)
    stock = AutoModelForCausalLM.from_pretrained(coarse_folder, dtype=torch.float32)
    with torch.no_grad():
        expected_BTV = stock(texts, use_cache=False).logits[:, 15:-1]
    found_BTV = torch.stack(seen, dim=1)
    assert (found_BTV - expected_BTV).norm() < 1e-4 * expected_BTV.norm()


def test_tokens_are_as_frequent_as_probable() -> None:
    logits = torch.tensor([0.3, -2.0, 1.1, -torch.inf, 0.0])
    n = 40_000
    drawn = draw_tokens(logits.repeat(n, 1), random_numbers((3,), n))
    found = torch.bincount(drawn, minlength=5) / n
    assert found.tolist() == pytest.approx(logits.softmax(0).tolist(), abs=4 * (0.25 / n) ** 0.5)
    assert found[3] == 0


def test_draws_at_the_borders_stay_in_the_vocabulary() -> None:
    logits = torch.zeros(2, 7)
    assert draw_tokens(logits, torch.tensor([0.0, np.nextafter(1.0, 0.0)])).tolist() == [0, 6]


def test_memory_limit_and_company_change_no_token(
    toy_checkpoint: Callable[..., Path], prompts_BP: torch.Tensor, uniform_BN: torch.Tensor, tmp_path: Path
) -> None:
    """Pruned, with a layer that lost its experts, and adapters that are no longer zero."""
    source = open_source(toy_checkpoint(tmp_path, n_layers=3))
    kept = tuple((expert,) for expert in range(0, 32, 2))
    student = Student(source, ExpertMap(32, (LayerMap(0, kept), LayerMap(1, ()), LayerMap(2, kept))))
    assert student.spec.layers[1].moe == NO_MOE != student.spec.layers[0].moe
    trained = TrainedStudent(student, Scope.adapters(2))
    for (name, _), tensor in trained.parameters.items():
        if name.endswith(".b"):
            tensor.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    nothing_stays, everything_stays = trained.streamed(None), trained.streamed(MemoryLimit(10**12, tmp_path))
    texts = sample_texts(nothing_stays, prompts_BP, uniform_BN)
    assert torch.equal(sample_texts(everything_stays, prompts_BP, uniform_BN), texts)
    assert torch.equal(sample_texts(nothing_stays, prompts_BP[3:5], uniform_BN[3:5]), texts[3:5])
    (hidden,) = everything_stays.stream([TokenGroup(texts)])  # the weights are as they were
    assert torch.isfinite(hidden.read(slice(0, 10))).all()


def test_random_numbers_belong_to_their_key() -> None:
    assert torch.equal(random_numbers((1, 2), 4), random_numbers((1, 2), 9)[:4])
    assert not torch.equal(random_numbers((1, 2), 4), random_numbers((2, 1), 4))


def test_more_texts_than_fit_are_refused(
    toy_checkpoint: Callable[..., Path], prompts_BP: torch.Tensor, uniform_BN: torch.Tensor, tmp_path: Path
) -> None:
    student = Student.teacher(open_source(toy_checkpoint(tmp_path)))
    assert cache_bytes(student.spec, 10, 28) == 10 * 28 * 4 * (2 * 2 * 4 * 32 + 256)
    assert cache_bytes(altered(student.spec, n_layers=1), 10, 28, torch.bfloat16) == 10 * 28 * 2 * (2 * 4 * 32 + 256)
    with pytest.raises(InputError, match=r"10 texts .* together need 0\.00 GB .* fewer batches in a round"):
        sample_texts(StreamedModel(student, limit=MemoryLimit(10**6, tmp_path)), prompts_BP, uniform_BN)
