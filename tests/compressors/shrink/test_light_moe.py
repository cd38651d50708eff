"""LightMoE's replaced experts: chosen, grouped and put together as the docstrings say, on trained blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from compressors.calibration.statistics import LayerStatistics
from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, Student
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from compressors.shrink.merge.similarity import output_cosines, router_logit_cosines
from compressors.shrink.moe_block import Evidence, MoeBlock
from compressors.shrink.replace import bases_by_layer
from compressors.shrink.replace.grouping import by_number, by_similarity
from compressors.shrink.replace.light_moe import LightMoE
from compressors.shrink.replace.selection import contributions, replaced_by_layer

TrainedBlock = Callable[..., tuple[MoeBlock, Evidence]]


@pytest.fixture(scope="module", params=["fine", "coarse"])
def trained(
    request: pytest.FixtureRequest, fine_folder: Path, coarse_folder: Path, trained_block: TrainedBlock
) -> tuple[MoeBlock, Evidence]:
    """A whole block of float32 experts, of which a test replaces a few."""
    block, evidence = trained_block(fine_folder if request.param == "fine" else coarse_folder, 1)
    widened = replace(block, gate_up_EFD=block.gate_up_EFD.float(), down_EDF=block.down_EDF.float())
    return widened, Evidence(evidence.statistics, evidence.sample_TD[:1024])


def test_at_full_rank_every_expert_is_the_original(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    full = min(block.width, block.router_ED.shape[1])
    result = LightMoE(3, 1, full)(block, evidence)
    assert result.parts is not None and len(result.changed_experts) == 3
    inputs_TD = evidence.sample_TD[:64]
    for expert in result.changed_experts:
        assert not torch.equal(result.block.down(expert), block.down(expert))
        expected_TD = block.output(expert, inputs_TD)
        difference = (result.block.output(expert, inputs_TD) - expected_TD).norm()
        assert difference < 1e-4 * expected_TD.norm()
    expected_TD = block.forward(inputs_TD)
    assert (result.block.forward(inputs_TD) - expected_TD).norm() < 1e-4 * expected_TD.norm()


def test_the_experts_of_least_contribution_share_weighted_means(trained: tuple[MoeBlock, Evidence]) -> None:
    """The base is the mean of the members in the order that the adapters undo at full rank."""
    block, evidence = trained
    full = min(block.width, block.router_ED.shape[1])
    result = LightMoE(5, 2, full)(block, evidence)
    parts, shares_E = result.parts, contributions(evidence.statistics)
    assert parts is not None and shares_E.sum().item() == pytest.approx(1)
    assert max(shares_E[list(parts.shared.replaced)]) <= min(
        share for expert, share in enumerate(shares_E) if expert not in parts.shared.replaced
    )
    for base in range(2):
        members = parts.shared.members(base)
        weights = shares_E[list(members)] / shares_E[list(members)].sum()
        for number in range(3):
            mean = sum(weight * parts.matrix(e, number).double() for weight, e in zip(weights, members, strict=True))
            torch.testing.assert_close(parts.bases[base][number].double(), mean, atol=1e-5, rtol=1e-4)
        leader = max(members, key=lambda expert: float(shares_E[expert]))
        torch.testing.assert_close(result.block.down(leader), block.down(leader), atol=1e-5, rtol=1e-4)


def test_a_smaller_rank_is_nearer_than_the_base_alone(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    errors = []
    for rank in (1, 8, 32):
        result = LightMoE(4, 1, rank)(block, evidence)
        assert result.parts is not None
        assert all(
            (a_RI.shape[0], b_OR.shape[1]) == (rank, rank)
            for pairs in result.parts.adapters.values()
            for a_RI, b_OR in pairs
        )
        errors.append(
            sum(
                (result.block.output(expert, evidence.sample_TD) - block.output(expert, evidence.sample_TD)).norm()
                for expert in result.changed_experts
            )
        )
    assert errors[0] > errors[1] > errors[2] > 0


def test_groups_join_the_most_similar_and_leave_nobody_alone(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    cosines_EE = (router_logit_cosines(evidence.statistics) + output_cosines(block, evidence.sample_TD)) / 2
    experts = list(range(8))
    for n_groups in (1, 2, 3, 4):
        groups = by_similarity(block, evidence, experts, n_groups)
        assert sorted(expert for group in groups for expert in group) == experts
        assert len(groups) == n_groups and min(map(len, groups)) >= 2
    closest = max(combinations(experts, 2), key=lambda pair: float(cosines_EE[pair]))
    assert any({*closest} <= {*group} for group in by_similarity(block, evidence, experts, 4))
    assert by_number([7, 1, 4, 2, 9], 2) == ((1, 2, 4), (7, 9))


def _statistics(gate_norms: Sequence[float], cosine: float) -> LayerStatistics:
    """Statistics of ten tokens whose mean cosine before and behind the feed-forward is this."""
    statistics = LayerStatistics.__new__(LayerStatistics)
    statistics.gate_norm_sum_E = torch.tensor(gate_norms, dtype=torch.float64)
    statistics.count_E = torch.ones(len(gate_norms), dtype=torch.float64)
    statistics.n_tokens, statistics.moe_cosine_sum = torch.tensor(10.0), torch.tensor(10 * cosine)
    return statistics


def test_layers_give_the_experts_of_least_share() -> None:
    layers = [
        _statistics([94, 2, 2, 2], 0.9),  # leans on one expert
        _statistics([25, 25, 25, 25], 0.9),
        _statistics([4000, 4000, 1500, 500], 0.9),  # larger outputs do not count where they turn the states as much
    ]
    assert replaced_by_layer(layers, 5, 1) == [3, 0, 2]
    assert replaced_by_layer(layers, 4, 1) == [2, 0, 2]  # none is replaced alone
    assert replaced_by_layer(layers, 2, 1) == [2, 0, 0]
    assert replaced_by_layer(layers, 12, 1) == [4, 4, 4]
    for number in range(2, 13):
        counts = replaced_by_layer(layers, number, 1)
        assert sum(counts) == number and 1 not in counts and max(counts) <= 4
    with pytest.raises(InputError, match="give a number from 2 to 12"):
        replaced_by_layer(layers, 1, 1)


def test_a_layer_that_turns_the_states_keeps_its_experts() -> None:
    """A share of 0.02 in a layer that changes much is more than 0.25 in one that changes little."""
    turning, still, between = (_statistics([94, 2, 2, 2], 0.1), _statistics([1] * 4, 0.99), _statistics([1] * 4, 0.95))
    assert replaced_by_layer([turning, still, between], 4, 1) == [0, 4, 0]
    assert replaced_by_layer([turning, still, between], 8, 1) == [0, 4, 4]
    assert replaced_by_layer([turning, still, between], 10, 1) == [2, 4, 4]
    against = _statistics([1] * 4, -0.5)  # a cosine below zero is a larger change than one of zero
    assert replaced_by_layer([against, _statistics([1] * 4, 0.0)], 4, 1) == [0, 4]


def test_bases_find_two_experts_each() -> None:
    """Odd numbers of experts leave one without a partner: layers even them out where there are many bases."""
    layers = [_statistics([9] * 8, 0.1), _statistics([1] * 7 + [9], 0.96), _statistics([1] * 5 + [9] * 3, 0.97)]
    assert replaced_by_layer(layers, 12, 3) == [0, 7, 5]
    counts = replaced_by_layer(layers, 12, 6)
    assert sum(counts) == 12 and all(count % 2 == 0 for count in counts)
    assert bases_by_layer(counts, 6) == [count // 2 for count in counts]


def test_bases_follow_the_replaced_experts() -> None:
    assert bases_by_layer([8, 0, 2, 4], 3) == [1, 0, 1, 1]
    assert bases_by_layer([8, 0, 2, 4], 5) == [3, 0, 1, 1]
    assert bases_by_layer([8, 0, 2, 4], 7) == [4, 0, 1, 2]
    for number in (2, 8):
        with pytest.raises(InputError, match="give a number from 3 to 7"):
            bases_by_layer([8, 0, 2, 4], number)


def test_experts_without_tokens_count_alike() -> None:
    assert contributions(_statistics([0, 0, 0], 1)).tolist() == [1 / 3] * 3


@pytest.mark.parametrize(("n_replaced", "n_bases", "rank"), [(3, 2, 4), (2, 0, 4), (33, 2, 4), (4, 2, 0)])
def test_numbers_that_are_not_possible_are_refused(
    trained: tuple[MoeBlock, Evidence], n_replaced: int, n_bases: int, rank: int
) -> None:
    with pytest.raises(InputError, match=r"cannot stand on|is impossible"):
        LightMoE(n_replaced, n_bases, rank)(*trained)


def test_apart_or_multiplied_out_it_is_the_same_student(float32_toy: Source, trained_block: TrainedBlock) -> None:
    """A layer whose parts stay apart has the values of one whose experts are written whole."""
    statistics = [trained_block(float32_toy.path, layer)[1].statistics for layer in (0, 1)]
    tokens_BT = torch.arange(512).reshape(1, 512)
    size, method = float32_toy.spec.layers[0].moe, LightMoE(6, 2, 5)
    students = []
    for apart in (True, False):
        targets = [LayerTarget(0, size, (method,), keeps_parts=apart), LayerTarget(1, size)]
        run = list(LayerwiseCompression(float32_toy, targets, statistics, tokens_BT, n_sample_blocks=1).run())
        student = Student(float32_toy, ExpertMap(32, tuple(layer.map for layer in run)))
        overlay = {name: tensor for layer in run for name, tensor in layer.overlay.items()}
        students.append(student.with_overlay(overlay))
        stored = sum(tensor.numel() for tensor in overlay.values())
        sizes = [float32_toy.spec.dimensions(role, 0) for role in (Role.EXPERT_UP, Role.EXPERT_UP, Role.EXPERT_DOWN)]
        shared = students[0].shared(0)
        assert shared is not None
        whole = 6 * sum(rows * columns for rows, columns in sizes)
        assert stored == (sum(shared.n_values(*size) for size in sizes) if apart else whole)
    assert students[0].spec.layers[0].bases == students[0].shared(0) and students[1].shared(0) is None
    for expert in range(32):
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
            torch.testing.assert_close(students[0].expert(role, 0, expert), students[1].expert(role, 0, expert))
