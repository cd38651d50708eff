"""The parts of merging: neuron alignment, averages, and statistics of merged experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressors.model.description.routing import Routing
from compressors.shrink.merge import merge_groups, merged_statistics
from compressors.shrink.merge.alignment import match_weights, match_weights_and_activations
from compressors.shrink.moe_block import Evidence, MoeBlock

Blocks = Callable[[Path, int], tuple[MoeBlock, Evidence]]


def _with_copy(block: MoeBlock, source: int, target: int, order: torch.Tensor) -> MoeBlock:
    """The block whose expert ``target`` is ``source`` with its neurons in another order."""
    gate, up = block.gate_up_EFD[source].chunk(2)
    gate_up_EFD, down_EDF = block.gate_up_EFD.clone(), block.down_EDF.clone()
    gate_up_EFD[target], down_EDF[target] = torch.cat([gate[order], up[order]]), block.down_EDF[source][:, order]
    return replace(block, gate_up_EFD=gate_up_EFD, down_EDF=down_EDF)


@pytest.mark.parametrize("by_activations", [False, True])
def test_alignment_gives_a_permuted_expert_back_exactly(
    trained_block: Blocks, coarse_folder: Path, by_activations: bool
) -> None:
    block, evidence = trained_block(coarse_folder, 2)
    order = torch.randperm(block.width, generator=torch.Generator().manual_seed(1))
    permuted = _with_copy(block, 3, 6, order)
    if by_activations:
        found = match_weights_and_activations(permuted, evidence.sample_TD[:512], 3, 6)
    else:
        found = match_weights(permuted, 3, 6)
    assert torch.equal(permuted.gate(6)[found], block.gate(3))
    assert torch.equal(permuted.up(6)[found], block.up(3))
    assert torch.equal(permuted.down(6)[:, found], block.down(3))


def test_neurons_without_activity_do_not_disturb_alignment(trained_block: Blocks, coarse_folder: Path) -> None:
    block, _ = trained_block(coarse_folder, 2)
    order = torch.randperm(block.width, generator=torch.Generator().manual_seed(1))
    permuted = _with_copy(block, 3, 6, order)
    silent = torch.zeros(8, block.router_ED.shape[1])
    assert torch.equal(permuted.gate(6)[match_weights_and_activations(permuted, silent, 3, 6)], block.gate(3))


def test_a_group_without_weight_is_averaged_plainly(trained_block: Blocks, coarse_folder: Path) -> None:
    block, _ = trained_block(coarse_folder, 2)
    groups = ((0, 4, 7), (1,), (2,), (3,), (5,), (6,))
    weights_E = torch.tensor([0.0, 1, 1, 1, 0, 1, 1, 0])
    result = merge_groups(block, groups, weights_E, average_router=True)
    mean = (block.gate_up_EFD[0].double() + block.gate_up_EFD[4].double() + block.gate_up_EFD[7].double()) / 3
    torch.testing.assert_close(result.block.gate_up_EFD[0], mean.to(block.gate_up_EFD.dtype))
    torch.testing.assert_close(result.block.router_ED[0], block.router_ED[[0, 4, 7]].mean(0))
    assert result.changed_experts == {0}
    assert torch.equal(result.block.down_EDF[1:], block.down_EDF[[1, 2, 3, 5, 6]])


def test_scales_of_experts_are_averaged_as_parts_of_their_matrices() -> None:
    """Two experts whose outputs are equal after scaling, by different scales, give that output back."""
    generator = torch.Generator().manual_seed(2)
    gate_up_EFD, down_EDF = torch.randn(3, 8, 6, generator=generator), torch.randn(3, 6, 4, generator=generator)
    gate_up_EFD[1], down_EDF[1] = gate_up_EFD[0], down_EDF[0] / 4
    scale_E, routing = torch.tensor([0.5, 2.0, 3.0]), Routing(has_expert_scale=True)
    block = MoeBlock(torch.randn(3, 6), gate_up_EFD, down_EDF, 1, routing, expert_scale_E=scale_E)
    merged = merge_groups(block, ((0, 1), (2,)), torch.tensor([1.0, 3.0, 1.0]), average_router=False).block
    assert merged.expert_scale_E is not None
    torch.testing.assert_close(merged.expert_scale_E, torch.tensor([1.625, 3.0]))
    torch.testing.assert_close(1.625 * merged.down(0), 0.5 * block.down(0))
    assert torch.equal(merged.down(1), block.down(2))


def test_merged_statistics_are_their_members(trained_block: Blocks, coarse_folder: Path) -> None:
    block, evidence = trained_block(coarse_folder, 3)
    groups = ((1, 0, 6), (2,), (4, 3), (5,), (7,))
    merged = merged_statistics(evidence.statistics, groups)
    routes = block.route(evidence.sample_TD)
    for index, group in enumerate(groups):
        count, squares, largest = 0, torch.zeros(block.router_ED.shape[1], dtype=torch.float64), 0.0
        for expert in group:
            tokens, _ = routes.of_expert(expert)
            count += len(tokens)
            squares += evidence.sample_TD[tokens].double().square().sum(0)
            largest = max(largest, float(block.output(expert, evidence.sample_TD[tokens]).norm(dim=-1).max()))
        assert merged.count_E[index] == count
        torch.testing.assert_close(merged.gate_up_input_square_ED[index], squares, rtol=1e-4, atol=1e-4)
        assert merged.norm_max_E[index].item() == pytest.approx(largest, rel=1e-4)
        origin_tokens, _ = routes.of_expert(group[0])
        hidden_nF = block.hidden(group[0], evidence.sample_TD[origin_tokens]).double()
        torch.testing.assert_close(
            merged.down_input_square_EF[index] / count, hidden_nF.square().mean(0), rtol=1e-4, atol=1e-6
        )
    assert merged.router_logit_gram_EE.shape == (5, 5)
    assert merged.router_logit_gram_EE[2, 0] == evidence.statistics.router_logit_gram_EE[4, 1]
    assert merged.n_tokens == evidence.statistics.n_tokens
    assert merged.count_E.sum() == evidence.statistics.count_E.sum()
