"""Global allocation and super-experts against their definitions, on the statistics of trained models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compressors.calibration.statistics import LayerStatistics
from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from compressors.shrink.allocation import allocate_globally, super_experts
from compressors.shrink.criteria import CRITERIA
from compressors.shrink.moe_block import Evidence, MoeBlock

TrainedBlock = Callable[..., tuple[MoeBlock, Evidence]]


def _statistics(folder: Path, trained_block: TrainedBlock) -> list[LayerStatistics]:
    return [trained_block(folder, layer)[1].statistics for layer in range(open_source(folder).spec.n_layers)]


def _drop_one_by_one(scores: list[list[float]], n_kept_total: int, minimum: int) -> list[int]:
    """The lowest score of all layers goes, again and again; a layer at its minimum is passed over."""
    left = [dict(enumerate(layer)) for layer in scores]
    while sum(map(len, left)) > n_kept_total:
        candidates = [
            (score, -layer, -expert)
            for layer, experts in enumerate(left)
            if len(experts) > minimum
            for expert, score in experts.items()
        ]
        _, layer, expert = min(candidates)
        del left[-layer][-expert]
    return [len(experts) for experts in left]


@pytest.mark.parametrize("criterion", ["expert-drop", "frequency", "reap"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.75, 1.0])
def test_the_lowest_of_the_whole_model_are_dropped(
    family_folder: Path, trained_block: TrainedBlock, criterion: str, share: float
) -> None:
    spec = open_source(family_folder).spec
    scores = [CRITERIA[criterion](layer) for layer in _statistics(family_folder, trained_block)]
    n_kept = max(int(share * spec.n_layers * spec.n_experts), spec.n_layers * spec.top_k)
    counts = allocate_globally(scores, n_kept, spec.top_k)
    assert counts == _drop_one_by_one([layer.tolist() for layer in scores], n_kept, spec.top_k)
    assert sum(counts) == n_kept
    assert min(counts) >= spec.top_k


def test_layers_may_differ_and_ties_keep_the_first() -> None:
    scores = [torch.tensor([5.0, 5.0, 5.0]), torch.tensor([1.0, 5.0, 5.0, 2.0]), torch.tensor([0.0, 0.0])]
    assert allocate_globally(scores, 9, 1) == [3, 4, 2]
    assert allocate_globally(scores, 8, 1) == [3, 4, 1]  # the tie in the last layer
    assert allocate_globally(scores, 6, 1) == [3, 2, 1]  # the last layer's only expert is safe, though it scores 0
    assert allocate_globally(scores, 5, 1) == [3, 1, 1]  # all that is left scores 5: the earlier layer stays
    assert allocate_globally(scores, 3, 1) == [1, 1, 1]


def test_protection_by_infinite_scores_does_not_starve_another_layer() -> None:
    scores = [torch.full((4,), torch.inf), torch.tensor([1.0, 2.0, 3.0, 4.0])]
    assert allocate_globally(scores, 4, 2) == [2, 2]
    assert allocate_globally(scores, 6, 2) == [4, 2]


@pytest.mark.parametrize(
    ("n_kept_total", "minimum", "message"),
    [(7, 4, "from 8 to 16"), (17, 4, "from 8 to 16"), (8, 0, "from 1 to 8"), (16, 9, "from 1 to 8")],
)
def test_impossible_numbers_are_refused(n_kept_total: int, minimum: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        allocate_globally([torch.zeros(8), torch.zeros(8)], n_kept_total, minimum)


def _super_experts_by_definition(statistics: list[LayerStatistics]) -> list[set[int]]:
    peaks = [layer.output_max_E.tolist() for layer in statistics]
    everywhere = [peak for layer in peaks for peak in layer]
    found: list[set[int]] = []
    for layer, of_layer in enumerate(peaks):
        found.append(set())
        for expert, peak in enumerate(of_layer):
            early = layer < int(0.75 * len(peaks))
            if early and peak > np.percentile(everywhere, 99.5) and peak > max(everywhere) / 10:
                found[layer].add(expert)
    return found


def _with_peaks(statistics: list[LayerStatistics], peaks: dict[tuple[int, int], float]) -> list[LayerStatistics]:
    """Some experts' outputs reach so many times the model's largest."""
    largest = max(layer.output_max_E.max().item() for layer in statistics)
    changed = list(statistics)
    for (layer, expert), factor in peaks.items():
        output_max_E = changed[layer].output_max_E.clone()
        output_max_E[expert] = factor * largest
        changed[layer] = replace(changed[layer], output_max_E=output_max_E)
    return changed


@pytest.mark.parametrize(
    ("peaks", "expected"),
    [
        ({(0, 3): 2.0}, {(0, 3)}),
        ({(3, 30): 2.0}, {(3, 30)}),  # the last layer that counts: int(0.75 * 6) = 4
        ({(4, 30): 2.0}, set()),  # too late, and the highest of the others is below the percentile
        ({(0, 3): 20.0, (1, 1): 19.0, (2, 5): 3.0, (2, 7): 18.0}, {(0, 3)}),  # one of 192 lies above the percentile
    ],
)
def test_outliers_in_the_first_three_quarters_are_super_experts(
    fine_folder: Path,
    trained_block: TrainedBlock,
    peaks: dict[tuple[int, int], float],
    expected: set[tuple[int, int]],
) -> None:
    statistics = _with_peaks(_statistics(fine_folder, trained_block), peaks)
    found = super_experts(statistics)
    assert found == _super_experts_by_definition(statistics)
    assert {(layer, expert) for layer, experts in enumerate(found) for expert in experts} == expected


def test_super_experts_of_the_trained_models(family_folder: Path, trained_block: TrainedBlock) -> None:
    statistics = _statistics(family_folder, trained_block)
    assert super_experts(statistics) == _super_experts_by_definition(statistics)
    assert sum(map(len, super_experts(statistics))) <= 1


def test_a_tenth_of_the_largest_is_asked_of_super_experts_too(fine_folder: Path, trained_block: TrainedBlock) -> None:
    """Four of 768 experts lie above the percentile; a tenth of the largest is higher."""
    statistics = _statistics(fine_folder, trained_block) * 4
    outliers = _with_peaks(statistics, {(0, 0): 1000.0, (1, 1): 101.0, (2, 2): 99.0})
    assert super_experts(outliers) == _super_experts_by_definition(outliers)
    assert super_experts(outliers)[:3] == [{0}, {1}, frozenset()]
