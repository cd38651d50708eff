"""M-SMoE, HC-SMoE and REAM against brute force by their definitions, on blocks of trained models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from compressors.model.errors import InputError
from compressors.shrink.merge import REAM, HCSMoE, MSMoE
from compressors.shrink.moe_block import CompressedBlock, Evidence, Method, MoeBlock

Blocks = Callable[[Path, int], tuple[MoeBlock, Evidence]]
Groups = tuple[tuple[int, ...], ...]

N_TOKENS = 512  # of the 4,096 that the fixture has
METHODS: list[type[MSMoE] | type[HCSMoE] | type[REAM]] = [MSMoE, HCSMoE, REAM]


@pytest.fixture(params=["fine", "coarse"])
def folder(request: pytest.FixtureRequest, fine_folder: Path, coarse_folder: Path) -> Path:
    return {"fine": fine_folder, "coarse": coarse_folder}[request.param]


def _in_float32(block: MoeBlock) -> MoeBlock:
    """The same weights; merged ones are then not rounded to a storage dtype."""
    return replace(block, gate_up_EFD=block.gate_up_EFD.float(), down_EDF=block.down_EDF.float())


def _fewer_tokens(evidence: Evidence) -> Evidence:
    return replace(evidence, inputs_TD=evidence.sample_TD[:N_TOKENS])


# --- the definitions, written out ------------------------------------------------------------------------------------


def _parts(block: MoeBlock, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, up = block.gate_up_EFD[expert].double().chunk(2)
    return gate, up, block.down_EDF[expert].double()


def _hidden(block: MoeBlock, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    gate, up, _ = _parts(block, expert)
    before = inputs.double() @ gate.T
    return before / (1 + torch.exp(-before)) * (inputs.double() @ up.T)


def _output(block: MoeBlock, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    return _hidden(block, expert, inputs) @ _parts(block, expert)[2].T


def _logits(block: MoeBlock, inputs: torch.Tensor) -> torch.Tensor:
    return inputs.double() @ block.router_ED.double().T


def _usage(block: MoeBlock, inputs: torch.Tensor) -> list[int]:
    usage = [0] * block.n_experts
    for logits in _logits(block, inputs).tolist():
        for expert in sorted(range(block.n_experts), key=lambda e: -logits[e])[: block.top_k]:
            usage[expert] += 1
    return usage


def _saliency(block: MoeBlock, inputs: torch.Tensor) -> list[float]:
    total, count = [0.0] * block.n_experts, [0] * block.n_experts
    norms = [_output(block, expert, inputs).norm(dim=1).tolist() for expert in range(block.n_experts)]
    for token, logits in enumerate(_logits(block, inputs)):
        probabilities = logits.softmax(0).tolist()
        chosen = sorted(range(block.n_experts), key=lambda e: -probabilities[e])[: block.top_k]
        for expert in chosen:
            gate = probabilities[expert] / (sum(probabilities[e] for e in chosen) if block.routing.normalizes else 1)
            total[expert] += gate * norms[expert][token]
            count[expert] += 1
    return [value / max(n, 1) for value, n in zip(total, count, strict=True)]


def _cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first * second).sum() / (first.norm() * second.norm()))


def _m_smoe_groups(block: MoeBlock, inputs: torch.Tensor, n_experts: int) -> Groups:
    usage, logits = _usage(block, inputs), _logits(block, inputs)
    dominant = sorted(sorted(range(block.n_experts), key=lambda e: (-usage[e], e))[:n_experts])
    groups: dict[int, list[int]] = {expert: [] for expert in dominant}
    for expert in range(block.n_experts):
        if expert not in dominant:
            similarity = {d: (_cosine(logits[:, expert], logits[:, d]) + 1) / 2 for d in dominant}
            groups[max(dominant, key=lambda d: similarity[d])].append(expert)
    return tuple((first, *rest) for first, rest in groups.items())


def _hc_smoe_groups(block: MoeBlock, inputs: torch.Tensor, usage: list[int], n_experts: int) -> Groups:
    features = [_output(block, expert, inputs).mean(0) for expert in range(block.n_experts)]
    distances = [[float((a - b).square().sum().sqrt()) for b in features] for a in features]
    clusters = [[expert] for expert in range(block.n_experts)]
    while len(clusters) > n_experts:
        pairs = [(i, j) for i in range(len(clusters)) for j in range(i)]

        def linkage(pair: tuple[int, int]) -> float:
            first, second = clusters[pair[0]], clusters[pair[1]]
            return sum(distances[a][b] for a in first for b in second) / (len(first) * len(second))

        i, j = min(pairs, key=linkage)
        clusters[j] += clusters.pop(i)
    groups = []
    for cluster in clusters:
        origin = max(sorted(cluster), key=lambda e: usage[e])
        groups.append((origin, *sorted(set(cluster) - {origin})))
    return tuple(sorted(groups))


def _ream_groups(
    block: MoeBlock, inputs: torch.Tensor, logits: torch.Tensor, saliency: list[float], n_experts: int, group_size: int
) -> Groups:
    outputs = [_output(block, expert, inputs) for expert in range(block.n_experts)]
    groups: dict[int, list[int]] = {}
    by_saliency = sorted(range(block.n_experts), key=lambda e: (-saliency[e], e))
    free = set(by_saliency[n_experts:])
    for centroid in by_saliency[:n_experts]:
        groups[centroid] = []
        similarity = {}
        for expert in free:
            products = (outputs[centroid] * outputs[expert]).sum(1)
            of_outputs = (products / outputs[centroid].norm(dim=1) / outputs[expert].norm(dim=1)).mean()
            of_logits = _cosine(logits[:, centroid], logits[:, expert])
            similarity[expert] = ((float(of_outputs) + 1) / 2 + (of_logits + 1) / 2) / 2
        while free and len(groups[centroid]) < group_size - 1:
            nearest = max(sorted(free), key=lambda e: similarity[e])
            groups[centroid].append(nearest)
            free.remove(nearest)
    assert not free
    return tuple(sorted((centroid, *sorted(rest)) for centroid, rest in groups.items()))


def _weight_order(block: MoeBlock, reference: int, expert: int) -> list[int]:
    """Least sum of squared differences of all weights, neuron beside neuron."""
    cost = sum(
        torch.cdist(a, b).square()
        for a, b in zip(_neuron_parts(block, reference), _neuron_parts(block, expert), strict=True)
    )
    assert isinstance(cost, torch.Tensor)
    return list(linear_sum_assignment(cost.numpy())[1])


def _ream_order(block: MoeBlock, inputs: torch.Tensor, reference: int, expert: int) -> list[int]:
    """Least sum of distances of normalised weights and normalised activations."""
    cost = torch.zeros(block.width, block.width, dtype=torch.float64)
    for of in (
        lambda e: torch.cat(_neuron_parts(block, e), dim=1),
        lambda e: _hidden(block, e, inputs).T,
    ):
        first, second = of(reference), of(expert)
        first, second = first / first.norm(dim=1, keepdim=True), second / second.norm(dim=1, keepdim=True)
        cost += torch.cdist(first, second)
    return list(linear_sum_assignment(cost.numpy())[1])


def _neuron_parts(block: MoeBlock, expert: int) -> list[torch.Tensor]:
    gate, up, down = _parts(block, expert)
    return [gate, up, down.T.contiguous()]


def _check_weights(
    block: MoeBlock,
    result: CompressedBlock,
    weights: list[float],
    order: Callable[[int, int], list[int]],
    average_router: bool,
) -> None:
    """Every group is its members' weighted mean, and a group of one is what it was."""
    for index, group in enumerate(result.groups):
        if len(group) == 1:
            assert index not in result.changed_experts
            assert torch.equal(result.block.gate_up_EFD[index], block.gate_up_EFD[group[0]])
            assert torch.equal(result.block.down_EDF[index], block.down_EDF[group[0]])
            assert torch.equal(result.block.router_ED[index], block.router_ED[group[0]])
            continue
        assert index in result.changed_experts
        total = sum(weights[expert] for expert in group)
        gate, up, down = (torch.zeros_like(part) for part in _parts(block, group[0]))
        row = torch.zeros_like(block.router_ED[0], dtype=torch.float64)
        for expert in group:
            neurons = list(range(block.width)) if expert == group[0] else order(group[0], expert)
            share = weights[expert] / total
            member_gate, member_up, member_down = _parts(block, expert)
            gate += share * member_gate[neurons]
            up += share * member_up[neurons]
            down += share * member_down[:, neurons]
            row += share * block.router_ED[expert].double()
        close = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(result.block.gate_up_EFD[index], torch.cat([gate, up]).float(), **close)
        torch.testing.assert_close(result.block.down_EDF[index], down.float(), **close)
        expected_row = row.float() if average_router else block.router_ED[group[0]]
        torch.testing.assert_close(result.block.router_ED[index], expected_row, **close)


# --- the methods -----------------------------------------------------------------------------------------------------


def test_m_smoe_is_its_definition(trained_block: Blocks, folder: Path) -> None:
    block, evidence = trained_block(folder, 1)
    block = _in_float32(block)
    usage = _usage(block, evidence.sample_TD)
    for n_experts in {block.n_experts // 2, block.top_k}:
        result = MSMoE(n_experts)(block, replace(evidence, inputs_TD=None))
        assert result.groups == _m_smoe_groups(block, evidence.sample_TD, n_experts)
        _check_weights(block, result, usage, lambda a, b: _weight_order(block, a, b), average_router=True)
        assert result.router_changed
        assert result.block.top_k == block.top_k


def test_hc_smoe_is_its_definition(trained_block: Blocks, folder: Path) -> None:
    block, evidence = trained_block(folder, 3)
    block = _in_float32(block)
    usage, sample = _usage(block, evidence.sample_TD), _fewer_tokens(evidence)
    for n_experts in {block.n_experts * 3 // 4, block.n_experts // 2, block.top_k}:
        result = HCSMoE(n_experts)(block, sample)
        assert result.groups == _hc_smoe_groups(block, sample.sample_TD, usage, n_experts)
        _check_weights(block, result, usage, lambda _a, _b: list(range(block.width)), average_router=True)
        assert result.router_changed


@pytest.mark.parametrize("group_size", [16, 3])
def test_ream_is_its_definition(trained_block: Blocks, folder: Path, group_size: int) -> None:
    block, evidence = trained_block(folder, 2)
    block = _in_float32(block)
    sample, logits = _fewer_tokens(evidence), _logits(block, evidence.sample_TD)
    saliency = _saliency(block, evidence.sample_TD)
    n_experts = block.n_experts // 2
    result = REAM(n_experts, group_size)(block, sample)
    assert result.groups == _ream_groups(block, sample.sample_TD, logits, saliency, n_experts, group_size)
    assert max(map(len, result.groups)) <= group_size
    _check_weights(
        block, result, saliency, lambda a, b: _ream_order(block, sample.sample_TD, a, b), average_router=False
    )
    assert not result.router_changed


def test_ream_leaves_most_centroids_alone(trained_block: Blocks, fine_folder: Path) -> None:
    block, evidence = trained_block(fine_folder, 2)
    groups = REAM(24)(block, _fewer_tokens(evidence)).groups
    assert sorted(map(len, groups)) == [1] * 23 + [9]  # the eight others go to the most salient one


# --- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_expert_is_in_one_group(trained_block: Blocks, fine_folder: Path, method: Callable[..., Method]) -> None:
    block, evidence = trained_block(fine_folder, 0)
    result = method(block.top_k)(block, _fewer_tokens(evidence))
    assert sorted(expert for group in result.groups for expert in group) == list(range(block.n_experts))
    assert result.groups == tuple(sorted((group[0], *sorted(group[1:])) for group in result.groups))
    assert result.block.n_experts == result.block.top_k == block.top_k
    assert result.block.gate_up_EFD.dtype == block.gate_up_EFD.dtype


@pytest.mark.parametrize("method", METHODS)
def test_one_expert_is_left(trained_block: Blocks, coarse_folder: Path, method: Callable[..., Method]) -> None:
    block, evidence = trained_block(coarse_folder, 0)
    evidence = _fewer_tokens(evidence)
    result = method(1)(block, evidence)
    assert [len(group) for group in result.groups] == [8]
    assert result.block.top_k == 1
    expected = result.block.output(0, evidence.sample_TD[:32])
    torch.testing.assert_close(result.block.forward(evidence.sample_TD[:32]), expected)


@pytest.mark.parametrize("method", METHODS)
def test_all_experts_kept_changes_nothing(
    trained_block: Blocks, coarse_folder: Path, method: Callable[..., Method]
) -> None:
    block, evidence = trained_block(coarse_folder, 0)
    result = method(8)(block, _fewer_tokens(evidence))
    assert result.groups == tuple((expert,) for expert in range(8))
    assert not result.changed_experts and not result.router_changed
    assert torch.equal(result.block.gate_up_EFD, block.gate_up_EFD)
    assert torch.equal(result.block.down_EDF, block.down_EDF)
    assert torch.equal(result.block.router_ED, block.router_ED)


@pytest.mark.parametrize("method", METHODS)
def test_the_given_block_does_not_change(
    trained_block: Blocks, coarse_folder: Path, method: Callable[..., Method]
) -> None:
    block, evidence = trained_block(coarse_folder, 1)
    before = [tensor.clone() for tensor in (block.router_ED, block.gate_up_EFD, block.down_EDF)]
    method(4)(block, _fewer_tokens(evidence))
    assert all(
        torch.equal(a, b) for a, b in zip(before, (block.router_ED, block.gate_up_EFD, block.down_EDF), strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_experts", [0, 9])
def test_impossible_counts_are_refused(
    trained_block: Blocks, coarse_folder: Path, method: Callable[..., Method], n_experts: int
) -> None:
    with pytest.raises(InputError, match=rf"8 experts into {n_experts}"):
        method(n_experts)(*trained_block(coarse_folder, 0))


def test_ream_refuses_groups_that_cannot_hold_all(trained_block: Blocks, fine_folder: Path) -> None:
    with pytest.raises(InputError, match="at least 2"):
        REAM(1)(*trained_block(fine_folder, 0))
    with pytest.raises(InputError, match="at least 11"):
        REAM(10, group_size=3)(*trained_block(fine_folder, 0))


def test_an_expert_never_routed_to_adds_nothing(trained_block: Blocks, coarse_folder: Path) -> None:
    block, evidence = trained_block(coarse_folder, 1)
    block = _in_float32(block)
    usage_E = evidence.statistics.count_E.clone()
    usage_E[[2, 5]] = 0
    unused = _fewer_tokens(replace(evidence, statistics=replace(evidence.statistics, count_E=usage_E)))
    for method in (MSMoE(1), HCSMoE(1)):
        group = method(block, unused).groups[0]
        result = method(block, unused).block
        without = method(block.keep([e for e in range(8) if e not in (2, 5)]), _without(unused, [2, 5])).block
        assert {2, 5} < set(group)
        torch.testing.assert_close(result.gate_up_EFD, without.gate_up_EFD)
        torch.testing.assert_close(result.router_ED, without.router_ED)


def _without(evidence: Evidence, experts: list[int]) -> Evidence:
    kept = [e for e in range(len(evidence.statistics.count_E)) if e not in experts]
    statistics = replace(
        evidence.statistics,
        count_E=evidence.statistics.count_E[kept],
        router_logit_gram_EE=evidence.statistics.router_logit_gram_EE[kept][:, kept],
    )
    return replace(evidence, statistics=statistics)


def test_ties_go_to_the_lower_index(trained_block: Blocks, coarse_folder: Path) -> None:
    block, evidence = trained_block(coarse_folder, 1)
    statistics = replace(
        evidence.statistics,
        count_E=torch.full((8,), 7.0, dtype=torch.float64),
        gate_norm_sum_E=torch.full((8,), 7.0, dtype=torch.float64),
        router_logit_gram_EE=torch.ones(8, 8, dtype=torch.float64),
    )
    equal = Evidence(statistics, torch.zeros(4, block.router_ED.shape[1]))  # all outputs are zero: equally similar
    assert MSMoE(3)(block, equal).groups == ((0, 3, 4, 5, 6, 7), (1,), (2,))
    assert REAM(3, group_size=4)(block, equal).groups == ((0, 3, 4, 5), (1, 6, 7), (2,))
    assert all(
        group[0] == min(group)
        for group in HCSMoE(3)(block, _fewer_tokens(replace(evidence, statistics=statistics))).groups
    )
