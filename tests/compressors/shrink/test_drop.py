"""The layers that change hidden states least, against cosines of stock transformers' hidden states, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compressors.calibration.statistics import LayerStatistics, StatisticsCollector
from compressors.model.errors import InputError
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from compressors.shrink.drop import block_similarities, moe_similarities, most_similar, window_similarities

_N_BLOCKS, _N_TOKENS = 9, 24  # more blocks than are copied at a time

States = npt.NDArray[np.float64]  # [tokens, D]


@dataclass(frozen=True)
class _Seen:
    """Stock transformers' hidden states: before each layer, before its MoE sub-layer, and after it."""

    before: list[States]
    between: list[States]
    after: list[States]


def _states(values: torch.Tensor) -> States:
    return np.asarray(values.detach().flatten(0, 1).double().numpy())


@torch.no_grad()
def _watch_stock(folder: Path, blocks_BT: torch.Tensor) -> _Seen:
    seen = _Seen([], [], [])
    stock: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer in stock.model.layers:
        layer.register_forward_pre_hook(lambda _module, inputs: seen.before.append(_states(inputs[0])))
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _module, inputs: seen.between.append(_states(inputs[0]))
        )
        layer.register_forward_hook(lambda _module, _inputs, output: seen.after.append(_states(output)))
    stock(blocks_BT, use_cache=False)
    return seen


def _mean_cosine(first: States, second: States) -> float:
    cosines = [
        float(np.dot(one, other) / (np.sqrt(np.dot(one, one)) * np.sqrt(np.dot(other, other))))
        for one, other in zip(first, second, strict=True)
    ]
    return sum(cosines) / len(cosines)


@pytest.fixture(scope="module")
def blocks_BT(heldout_tokens: npt.NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(heldout_tokens[3000 : 3000 + _N_BLOCKS * _N_TOKENS].reshape(_N_BLOCKS, _N_TOKENS))


@pytest.fixture(scope="module")
def teacher(family_folder: Path) -> StreamedModel:
    return StreamedModel(Student.teacher(open_source(family_folder)))


@pytest.fixture(scope="module")
def seen(family_folder: Path, blocks_BT: torch.Tensor) -> _Seen:
    return _watch_stock(family_folder, blocks_BT)


@pytest.fixture(scope="module")
def statistics(teacher: StreamedModel, blocks_BT: torch.Tensor) -> list[LayerStatistics]:
    collector = StatisticsCollector(teacher.spec)
    teacher.stream([TokenGroup(blocks_BT, [collector.observe])])
    return [collector.take(layer) for layer in range(teacher.spec.n_layers)]


def test_similarities_of_moe_sub_layers(statistics: list[LayerStatistics], seen: _Seen) -> None:
    expected = [_mean_cosine(*states) for states in zip(seen.between, seen.after, strict=True)]
    np.testing.assert_allclose(moe_similarities(statistics).numpy(), expected, rtol=1e-5)
    assert most_similar(moe_similarities(statistics), 2, "MoE layers") == _largest(expected, 2)


def test_similarities_of_blocks(statistics: list[LayerStatistics], seen: _Seen) -> None:
    expected = [_mean_cosine(*states) for states in zip(seen.before, seen.after, strict=True)]
    np.testing.assert_allclose(block_similarities(statistics).numpy(), expected, rtol=1e-5)
    assert most_similar(block_similarities(statistics), 1, "blocks") == _largest(expected, 1)


def test_similarities_of_windows(teacher: StreamedModel, blocks_BT: torch.Tensor, seen: _Seen) -> None:
    n_layers = teacher.spec.n_layers
    for n_dropped in (1, 2, n_layers - 1, n_layers):
        done: list[int] = []
        found = window_similarities(teacher, blocks_BT, n_dropped, done.append)
        expected = [
            _mean_cosine(seen.before[first], seen.after[first + n_dropped - 1])
            for first in range(n_layers - n_dropped + 1)
        ]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
        assert len(done) == n_layers


def test_windows_of_one_layer_are_blocks(
    teacher: StreamedModel, blocks_BT: torch.Tensor, statistics: list[LayerStatistics]
) -> None:
    windows = window_similarities(teacher, blocks_BT, 1)
    np.testing.assert_allclose(windows.numpy(), block_similarities(statistics).numpy(), rtol=1e-5)


def _largest(values: list[float], n: int) -> tuple[int, ...]:
    by_value = sorted(range(len(values)), key=lambda index: -values[index])
    assert values[by_value[n - 1]] - values[by_value[n]] > 1e-5, "the choice is no matter of rounding"
    return tuple(sorted(by_value[:n]))


def test_of_equal_scores_the_earlier_goes() -> None:
    scores = torch.tensor([0.5, 0.9, 0.7, 0.9, 0.9], dtype=torch.float64)
    assert most_similar(scores, 0, "blocks") == ()
    assert most_similar(scores, 1, "blocks") == (1,)
    assert most_similar(scores, 2, "blocks") == (1, 3)
    assert most_similar(scores, 4, "blocks") == (1, 2, 3, 4)


@pytest.mark.parametrize("n_dropped", [5, 6, -1])
def test_something_must_be_left(n_dropped: int) -> None:
    with pytest.raises(InputError, match=f"cannot drop {n_dropped} of 5 blocks: give a number from 0 to 4"):
        most_similar(torch.ones(5), n_dropped, "blocks")
