"""A MoE block computes what transformers' module computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.shrink.moe_block import CompressedBlock, Evidence, MoeBlock


@torch.no_grad()
def test_the_output_is_that_of_transformers(
    family_folder: Path, trained_block: Callable[..., tuple[MoeBlock, Evidence]]
) -> None:
    block, evidence = trained_block(family_folder, 1)
    inputs_TD = evidence.sample_TD[:256]
    stock = AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float32).model.layers[1].mlp
    torch.testing.assert_close(block.forward(inputs_TD), stock(inputs_TD[None])[0], rtol=1e-4, atol=1e-5)


def test_routes_are_counted_as_the_statistics_count_them(
    family_folder: Path, trained_block: Callable[..., tuple[MoeBlock, Evidence]]
) -> None:
    block, evidence = trained_block(family_folder, 0)
    routes = block.route(evidence.sample_TD)
    counts = torch.tensor([len(routes.of_expert(expert)[0]) for expert in range(block.n_experts)])
    assert (counts - evidence.statistics.count_E).abs().max() <= 1  # a tie in float32 may fall either way


def test_a_kept_block_is_the_block_of_the_experts_that_stay(
    fine_folder: Path, trained_block: Callable[..., tuple[MoeBlock, Evidence]]
) -> None:
    block, _ = trained_block(fine_folder, 0)
    kept = block.keep([1, 5, 7])
    assert (kept.n_experts, kept.top_k) == (3, 3)
    assert torch.equal(kept.down(1), block.down(5))
    assert torch.equal(kept.up(2), block.up(7))
    assert torch.equal(kept.router_ED[0], block.router_ED[1])


def test_nothing_is_changed_at_first(
    coarse_folder: Path, trained_block: Callable[..., tuple[MoeBlock, Evidence]]
) -> None:
    block, _ = trained_block(coarse_folder, 0)
    untouched = CompressedBlock.unchanged(block)
    assert untouched.block is block
    assert untouched.groups == tuple((expert,) for expert in range(8))
    assert untouched.changed_experts == frozenset()
    with pytest.raises(AssertionError):
        Evidence(trained_block(coarse_folder, 0)[1].statistics, None).sample_TD  # noqa: B018
