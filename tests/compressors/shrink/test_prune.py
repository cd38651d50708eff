"""Pruning keeps the experts that score highest by definition, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressors.model.errors import InputError
from compressors.shrink.criteria import CRITERION_NAMES, REMOVAL_ERROR
from compressors.shrink.moe_block import Evidence, MoeBlock, Needs
from compressors.shrink.prune import Prune, highest, scores

TrainedBlock = Callable[..., tuple[MoeBlock, Evidence]]


def _small(block_and_evidence: tuple[MoeBlock, Evidence]) -> tuple[MoeBlock, Evidence]:
    """Inputs of fewer tokens; only the removal error reads them."""
    block, evidence = block_and_evidence
    return block, replace(evidence, inputs_TD=evidence.sample_TD[:512])


@pytest.mark.parametrize("criterion", CRITERION_NAMES)
def test_the_highest_scores_stay(family_folder: Path, trained_block: TrainedBlock, criterion: str) -> None:
    block, evidence = _small(trained_block(family_folder, 0))
    values = scores(criterion, block, evidence).tolist()
    n_kept = block.n_experts // 2
    survivors = sorted(sorted(range(block.n_experts), key=lambda expert: (-values[expert], expert))[:n_kept])
    pruned = Prune(criterion, n_kept)(block, evidence)
    assert pruned.groups == tuple((expert,) for expert in survivors)
    assert (pruned.changed_experts, pruned.router_changed) == (frozenset(), False)
    assert (pruned.block.n_experts, pruned.block.top_k) == (n_kept, block.top_k)
    for number, expert in enumerate(survivors):
        assert torch.equal(pruned.block.router_ED[number], block.router_ED[expert])
        assert torch.equal(pruned.block.gate_up_EFD[number], block.gate_up_EFD[expert])
        assert torch.equal(pruned.block.down_EDF[number], block.down_EDF[expert])


def test_dropping_nothing_changes_nothing(family_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = _small(trained_block(family_folder, 0))
    pruned = Prune("reap", block.n_experts)(block, evidence).block
    assert torch.equal(pruned.forward(evidence.sample_TD), block.forward(evidence.sample_TD))


@pytest.mark.parametrize("n_experts", [1, 3, 4])
def test_top_k_is_never_above_the_experts_left(fine_folder: Path, trained_block: TrainedBlock, n_experts: int) -> None:
    block, evidence = trained_block(fine_folder, 0)
    pruned = Prune("reap", n_experts)(block, evidence).block
    assert (pruned.n_experts, pruned.top_k) == (n_experts, n_experts)
    assert pruned.forward(evidence.sample_TD[:8]).isfinite().all()


def test_protected_experts_stay_and_the_best_fill_up(coarse_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = trained_block(coarse_folder, 0)
    by_score = scores("man", block, evidence).argsort(descending=True).tolist()
    worst = frozenset(by_score[-2:])
    pruned = Prune("man", 4, protected=worst)(block, evidence)
    assert {group[0] for group in pruned.groups} == worst | set(by_score[:2])
    only = Prune("man", 2, protected=worst)(block, evidence)
    assert {group[0] for group in only.groups} == worst


def test_of_equal_experts_the_first_stays(coarse_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = trained_block(coarse_folder, 0)
    statistics = replace(evidence.statistics, count_E=torch.tensor([1.0, 3, 2, 3, 2, 2, 0, 0], dtype=torch.float64))
    kept = [group[0] for group in Prune("frequency", 3)(block, Evidence(statistics, None)).groups]
    assert kept == [1, 2, 3]
    kept = [group[0] for group in Prune("frequency", 7)(block, Evidence(statistics, None)).groups]
    assert kept == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("criterion", CRITERION_NAMES)
def test_only_the_removal_error_asks_for_inputs(fine_folder: Path, trained_block: TrainedBlock, criterion: str) -> None:
    method = Prune(criterion, 16)
    assert (method.needs == Needs.INPUTS) == (criterion == REMOVAL_ERROR)
    if method.needs == Needs.STATISTICS:
        block, evidence = trained_block(fine_folder, 0)
        assert method(block, replace(evidence, inputs_TD=None)).groups == method(block, evidence).groups


@pytest.mark.parametrize("n_experts", [-1, 0, 9])
def test_impossible_counts_are_refused(coarse_folder: Path, trained_block: TrainedBlock, n_experts: int) -> None:
    with pytest.raises(InputError, match=rf"cannot keep {n_experts} .* from 1 to 8"):
        Prune("reap", n_experts)(*trained_block(coarse_folder, 0))


def test_fewer_than_the_protected_cannot_be_kept(coarse_folder: Path, trained_block: TrainedBlock) -> None:
    with pytest.raises(InputError, match=r"cannot keep 2 .* 3 of them protected.* from 3 to 8"):
        Prune("reap", 2, protected=frozenset({0, 5, 6}))(*trained_block(coarse_folder, 0))


def test_an_expert_that_is_not_there_cannot_be_protected(coarse_folder: Path, trained_block: TrainedBlock) -> None:
    with pytest.raises(InputError, match=r"\[8\].* 0 to 7"):
        Prune("reap", 4, protected=frozenset({1, 8}))(*trained_block(coarse_folder, 0))


def test_an_unknown_criterion_is_refused_with_those_that_exist(
    coarse_folder: Path, trained_block: TrainedBlock
) -> None:
    with pytest.raises(InputError, match=r"'raep'.*frequency.*reap.*removal-error"):
        Prune("raep", 4)
    with pytest.raises(InputError, match="'raep'"):
        scores("raep", *trained_block(coarse_folder, 0))


@pytest.mark.parametrize(
    ("values", "n_experts", "kept"),
    [
        ([0.1, 0.9, 0.5, 0.7], 2, (1, 3)),
        ([0.5, 0.5, 0.5, 0.5], 2, (0, 1)),  # ties: the lower index
        ([0.0, 0.0, 0.2, 0.0], 2, (0, 2)),  # experts never routed to score 0
        ([0.3, 0.2], 2, (0, 1)),
        ([0.3, 0.2, 0.4], 1, (2,)),
        ([0.3, 0.2], 0, ()),
    ],
)
def test_highest_scores(values: list[float], n_experts: int, kept: tuple[int, ...]) -> None:
    assert highest(torch.tensor(values), n_experts) == kept
