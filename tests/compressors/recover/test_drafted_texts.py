"""Texts that are drafted and checked against those that the model writes token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from compressors.recover import drafted_texts, text_cache
from compressors.recover.drafted_texts import Draft, Effort, write_texts
from compressors.recover.sampling import continue_texts
from compressors.recover.text_cache import TextCache

_N_PROMPT, _N_NEW = 9, 14


@pytest.fixture(scope="module", params=["fine", "coarse"])
def model(
    request: pytest.FixtureRequest, toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> StreamedModel:
    folder = toy_checkpoint(tmp_path_factory.mktemp("toy"), n_layers=2, model=request.param)
    return StreamedModel(Student.teacher(open_source(folder)))


@pytest.fixture(scope="module")
def prompts_BP(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(heldout_tokens[: 10 * _N_PROMPT].reshape(10, _N_PROMPT))


@pytest.fixture(scope="module")
def expected_BT(model: StreamedModel, prompts_BP: torch.Tensor) -> torch.Tensor:
    """The texts that grow by a token of each text in a pass, with the cache that other texts are written with."""
    return continue_texts(model, prompts_BP, _N_NEW, lambda logits_bV, *_: logits_bV.argmax(-1))


class _Greedy:
    """Chooses the most probable token, and keeps the last logits that each place was chosen from."""

    def __init__(self) -> None:
        self.logits: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, logits_nV: torch.Tensor, texts: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        self.logits |= dict(zip(zip(texts, places, strict=True), logits_nV.clone(), strict=True))
        return logits_nV.argmax(-1)


def _drafter(texts_BT: torch.Tensor, wrong: float) -> Draft:
    """Drafts these texts, in which a share of the tokens is wrong; some drafts are shorter than they may be."""
    generator = np.random.default_rng(3)

    def draft(texts: Sequence[int], tokens: Sequence[Sequence[int]], most: Sequence[int]) -> Sequence[Sequence[int]]:
        found = []
        for text, known, n_most in zip(texts, tokens, most, strict=True):
            assert known == texts_BT[text, : len(known)].tolist()
            right = texts_BT[text, len(known) : len(known) + n_most - (text == 1)].tolist()
            found.append([token + (generator.random() < wrong) for token in right])
        return found

    return draft


@pytest.mark.parametrize("wrong", [0.0, 0.2, 1.0])
def test_drafts_change_neither_a_token_nor_a_bit(
    model: StreamedModel, prompts_BP: torch.Tensor, expected_BT: torch.Tensor, wrong: float
) -> None:
    alone, checked = _Greedy(), _Greedy()
    written, effort = write_texts(model, prompts_BP, _N_NEW, alone)
    assert torch.equal(written, expected_BT)
    assert effort == Effort(passes=_N_NEW, drafted=0, accepted=0)
    progress: list[int] = []
    drafted, effort = write_texts(
        model, prompts_BP, _N_NEW, checked, _drafter(expected_BT, wrong), progress=progress.append
    )
    assert torch.equal(drafted, expected_BT)
    assert alone.logits.keys() == checked.logits.keys()
    assert all(torch.equal(logits_V, checked.logits[place]) for place, logits_V in alone.logits.items())
    assert sum(progress) == _N_NEW * len(prompts_BP)
    assert len(progress) == effort.passes
    n_passes = {0.0: 3, 0.2: 8, 1.0: _N_NEW}[wrong]
    assert effort.passes <= n_passes
    assert (effort.accepted == effort.drafted) == (wrong == 0.0)
    assert (effort.accepted == 0) == (wrong == 1.0)


def test_rows_of_one_call_change_no_bit(
    model: StreamedModel, prompts_BP: torch.Tensor, expected_BT: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, all_ = _Greedy(), _Greedy()
    write_texts(model, prompts_BP, _N_NEW, all_, _drafter(expected_BT, 0.2))
    monkeypatch.setattr(drafted_texts, "rows_at_once", lambda *_: 16)
    write_texts(model, prompts_BP, _N_NEW, few, _drafter(expected_BT, 0.2))
    assert all(torch.equal(logits_V, few.logits[place]) for place, logits_V in all_.logits.items())


@pytest.mark.parametrize("model", ["coarse"], indirect=True)  # threads wait for each other beside other tests
def test_with_more_threads_a_place_has_the_same_bits_in_every_company(
    model: StreamedModel, prompts_BP: torch.Tensor, expected_BT: torch.Tensor
) -> None:
    alone, checked, n_threads = _Greedy(), _Greedy(), torch.get_num_threads()
    draft = _drafter(expected_BT[:, : _N_PROMPT + 4], 0.2)
    torch.set_num_threads(2)
    try:
        write_texts(model, prompts_BP, 4, alone)
        write_texts(model, prompts_BP, 4, checked, draft)
    finally:
        torch.set_num_threads(n_threads)
    assert alone.logits.keys() == checked.logits.keys()
    assert all(torch.equal(logits_V, checked.logits[place]) for place, logits_V in alone.logits.items())


@pytest.mark.parametrize("n_in_memory", [0, 1])
def test_keys_and_values_on_the_disk_change_no_bit(
    model: StreamedModel,
    prompts_BP: torch.Tensor,
    expected_BT: torch.Tensor,
    n_in_memory: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twice_BP = torch.cat([prompts_BP, prompts_BP.flip(0)])
    twice_BT = torch.cat([expected_BT, expected_BT.flip(0)])
    in_memory, on_disk = _Greedy(), _Greedy()
    write_texts(model, twice_BP, _N_NEW, in_memory, _drafter(twice_BT, 0.2))
    limited = StreamedModel(model.student, limit=MemoryLimit(10**12, tmp_path / "spill"))
    monkeypatch.setattr(drafted_texts, "TextCache", lambda *args: TextCache(*args[:-1], n_in_memory))
    folders: list[Path] = []

    def new_file(shape: tuple[int, int, int], dtype: torch.dtype, folder: Path) -> HiddenStates:
        folders.append(folder)
        return HiddenStates(shape, dtype, folder)

    monkeypatch.setattr(text_cache, "HiddenStates", new_file)
    written, _ = write_texts(limited, twice_BP, _N_NEW, on_disk, _drafter(twice_BT, 0.2))
    assert torch.equal(written, twice_BT)
    assert folders == [tmp_path / "spill"] * 2 * (2 - n_in_memory)
    assert not list((tmp_path / "spill").iterdir()), "files have no names"
    assert in_memory.logits.keys() == on_disk.logits.keys()
    assert all(torch.equal(logits_V, on_disk.logits[place]) for place, logits_V in in_memory.logits.items())


def test_under_a_low_limit_texts_still_grow_together(
    model: StreamedModel, prompts_BP: torch.Tensor, expected_BT: torch.Tensor, tmp_path: Path
) -> None:
    limited = StreamedModel(model.student, limit=MemoryLimit(1, tmp_path / "spill"))
    written, effort = write_texts(limited, prompts_BP, _N_NEW, _Greedy(), _drafter(expected_BT, 0.0))
    assert torch.equal(written, expected_BT)
    assert effort.passes <= 3


def test_the_head_runs_no_further_than_the_first_wrong_token(
    model: StreamedModel, prompts_BP: torch.Tensor, expected_BT: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafted_texts, "_ROWS_OF_THE_HEAD", 1)
    rows: list[tuple[int, int]] = []
    greedy = _Greedy()

    def choose(logits_nV: torch.Tensor, texts: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        rows.extend(zip(texts, places, strict=True))
        return greedy(logits_nV, texts, places)

    written, _ = write_texts(model, prompts_BP, _N_NEW, choose, _drafter(expected_BT, 0.2))
    assert torch.equal(written, expected_BT)
    assert sorted(rows) == [(text, place) for text in range(len(prompts_BP)) for place in range(_N_NEW)], "once each"


def test_texts_that_ended_leave_the_batch(
    model: StreamedModel, prompts_BP: torch.Tensor, expected_BT: torch.Tensor
) -> None:
    """Here every text ends with its third token, or earlier."""
    ends = set(expected_BT[:, _N_PROMPT + 2].tolist())
    written, effort = write_texts(model, prompts_BP, _N_NEW, _Greedy(), ends=ends)
    assert effort.passes == 3
    for text, expected in zip(written.tolist(), expected_BT.tolist(), strict=True):
        n_kept = next(n for n in range(_N_PROMPT + 1, len(text) + 1) if text[n - 1] in ends)
        assert text[:n_kept] == expected[:n_kept]
        assert set(text[n_kept - 1 :]) == {text[n_kept - 1]}


def test_drafts_are_short_where_they_are_wrong_and_long_where_they_are_right(
    model: StreamedModel, prompts_BP: torch.Tensor, expected_BT: torch.Tensor
) -> None:
    asked: list[int] = []

    def nonsense(texts: Sequence[int], _: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        asked.append(max(most))
        return [[0] * n_most for n_most in most]

    _, effort = write_texts(model, prompts_BP, _N_NEW, _Greedy(), nonsense)
    assert asked[0] > 8
    assert set(asked[3:-1]) == {1}
    assert asked[-1] == 0
    assert effort.passes == _N_NEW
