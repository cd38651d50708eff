"""Activation-scaled SVD and D2-MoE against the published formulas, written out in numpy, on trained blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compressors.model.errors import InputError
from compressors.shrink.decompose import ActivationSvd, D2Moe
from compressors.shrink.decompose.d2_moe import usage_weighted_base
from compressors.shrink.moe_block import Evidence, MoeBlock
from tests.compressors.shrink.factor_errors import relative_errors

Array = npt.NDArray[np.float64]
TrainedBlock = Callable[..., tuple[MoeBlock, Evidence]]

_RANK = 24


@pytest.fixture(scope="module", params=["fine", "coarse"])
def trained(
    request: pytest.FixtureRequest, fine_folder: Path, coarse_folder: Path, trained_block: TrainedBlock
) -> tuple[MoeBlock, Evidence]:
    """Three experts of a layer, so that each test is quick; routes and statistics are those of the smaller block."""
    block, evidence = trained_block(fine_folder if request.param == "fine" else coarse_folder, 2)
    kept = block.keep([0, 2, 5])
    counts = torch.tensor([float(len(_tokens(kept, _array(evidence.sample_TD), expert))) for expert in range(3)])
    return replace(kept, top_k=2), Evidence(replace(evidence.statistics, count_E=counts.double()), evidence.sample_TD)


def _array(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def _tokens(block: MoeBlock, inputs: Array, expert: int) -> list[int]:
    """Rows whose largest two logits hold the expert's."""
    logits = inputs @ _array(block.router_ED).T
    return [token for token, row in enumerate(logits) if expert in np.argsort(-row)[:2]]


def _weights(block: MoeBlock, expert: int) -> tuple[Array, Array, Array]:
    gate_up, down = _array(block.gate_up_EFD[expert]), _array(block.down_EDF[expert])
    width = down.shape[1]
    return gate_up[:width], gate_up[width:], down


def _matrices_and_inputs(block: MoeBlock, evidence: Evidence, expert: int) -> list[tuple[Array, Array]]:
    """Each matrix of an expert with the inputs that it has for the tokens that choose the expert."""
    inputs = _array(evidence.sample_TD)
    inputs = inputs[_tokens(block, inputs, expert)]
    gate, up, down = _weights(block, expert)
    before = inputs @ gate.T
    hidden = before / (1 + np.exp(-before)) * (inputs @ up.T)
    return [(gate, inputs), (up, inputs), (down, hidden)]


def _second_moment(inputs: Array) -> tuple[Array, float]:
    """S with its ridge, and the ridge: the mean squared norm of the tokens."""
    ridge = float(np.mean([token @ token for token in inputs]))
    return inputs.T @ inputs + ridge * np.eye(inputs.shape[1]), ridge


def _published(matrix: Array, inputs: Array, rank: int) -> Array:
    """SVD-LLM: W L = U Sigma V^T is cut and L is divided out again."""
    factor = np.linalg.cholesky(_second_moment(inputs)[0])
    left, values, right = np.linalg.svd(matrix @ factor, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] @ np.linalg.inv(factor)


def _plain(matrix: Array, rank: int) -> Array:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def _close(actual: Array, expected: Array, relative: float = 1e-4) -> bool:
    return bool(np.linalg.norm(actual - expected) <= relative * np.linalg.norm(expected))


def test_error_is_the_sum_of_the_discarded_singular_values(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    cut = ActivationSvd(_RANK)(block, evidence).block
    for expert in range(block.n_experts):
        rebuilt = _weights(cut, expert)
        for new, (matrix, inputs) in zip(rebuilt, _matrices_and_inputs(block, evidence, expert), strict=True):
            moment, ridge = _second_moment(inputs)
            eigenvalues, vectors = np.linalg.eigh(moment)
            root = (vectors * np.sqrt(eigenvalues)) @ vectors.T
            discarded = np.sum(np.linalg.svd(matrix @ root, compute_uv=False)[_RANK:] ** 2)
            output_error = np.sum((inputs @ (new - matrix).T) ** 2)
            assert output_error + ridge * np.sum((new - matrix) ** 2) == pytest.approx(discarded, rel=1e-4)
            # no matrix of this rank can be better on these tokens than their outputs, cut
            optimum = np.sum(np.linalg.svd(inputs @ matrix.T, compute_uv=False)[_RANK:] ** 2)
            assert optimum < output_error < 1.05 * optimum


def test_outputs_on_routed_tokens_are_better_than_those_of_plain_svd(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    cut = ActivationSvd(_RANK)(block, evidence).block
    for expert in range(block.n_experts):
        rebuilt = _weights(cut, expert)
        for new, (matrix, inputs) in zip(rebuilt, _matrices_and_inputs(block, evidence, expert), strict=True):
            scaled, plain = (np.linalg.norm(inputs @ (other - matrix).T) for other in (new, _plain(matrix, _RANK)))
            assert scaled < plain


def test_each_expert_is_the_published_truncation(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    factors = ActivationSvd(_RANK).decompose(block, evidence)
    for expert in range(block.n_experts):
        parts = (*factors.of_inputs, factors.down)
        for part, (matrix, inputs) in zip(parts, _matrices_and_inputs(block, evidence, expert), strict=True):
            left, right = _array(part.left_EOr[expert]), _array(part.right_ErI[expert])
            assert left.shape == (matrix.shape[0], _RANK)
            assert right.shape == (_RANK, matrix.shape[1])
            assert _close(left @ right, _published(matrix, inputs, _RANK))


@pytest.mark.parametrize("method", [ActivationSvd, D2Moe])
def test_full_rank_is_exact(method: type[ActivationSvd | D2Moe], trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    compressed = method(min(block.width, block.router_ED.shape[1]))(block, evidence)
    for expert in range(block.n_experts):
        for new, old in zip(_weights(compressed.block, expert), _weights(block, expert), strict=True):
            assert _close(new, old, 1e-5)
    inputs = evidence.sample_TD[:256]
    expected = block.forward(inputs)
    assert (compressed.block.forward(inputs) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("method", [ActivationSvd, D2Moe])
def test_only_the_experts_change(method: type[ActivationSvd | D2Moe], trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    compressed = method(3)(block, evidence)
    assert compressed.groups == ((0,), (1,), (2,))
    assert compressed.changed_experts == {0, 1, 2}
    assert not compressed.router_changed
    assert compressed.block.router_ED is block.router_ED
    assert (compressed.block.top_k, compressed.block.routing) == (block.top_k, block.routing)
    again = method(3)(block, evidence).block
    assert torch.equal(again.gate_up_EFD, compressed.block.gate_up_EFD)
    assert torch.equal(again.down_EDF, compressed.block.down_EDF)


def test_an_expert_that_no_token_chose_gets_the_plain_svd(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    inputs = _array(evidence.sample_TD)
    others = sorted(set(range(len(inputs))) - set(_tokens(block, inputs, 1)))
    cut = ActivationSvd(_RANK)(block, Evidence(evidence.statistics, evidence.sample_TD[others])).block
    for new, old in zip(_weights(cut, 1), _weights(block, 1), strict=True):
        assert _close(new, _plain(old, _RANK))


def test_the_cut_holds_on_tokens_that_were_not_in_the_sample(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    sample, others = evidence.sample_TD[::8], evidence.sample_TD[1::8]
    cut = ActivationSvd(_RANK)(block, Evidence(evidence.statistics, sample)).block
    for expert in range(block.n_experts):
        unseen = _matrices_and_inputs(block, Evidence(evidence.statistics, others), expert)
        for new, (matrix, inputs) in zip(_weights(cut, expert), unseen, strict=True):
            scaled, plain = (np.linalg.norm(inputs @ (other - matrix).T) for other in (new, _plain(matrix, _RANK)))
            assert scaled < plain


@pytest.mark.parametrize("method", [ActivationSvd, D2Moe])
@pytest.mark.parametrize("rank", [0, 1000])
def test_impossible_ranks_are_refused(
    method: type[ActivationSvd | D2Moe], rank: int, trained: tuple[MoeBlock, Evidence]
) -> None:
    with pytest.raises(InputError, match=f"rank {rank} .* from 1 to {min(trained[0].width, 256)}"):
        method(rank)(*trained)


def test_d2_moe_is_the_usage_weighted_base_plus_truncated_deltas(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    factors = D2Moe(_RANK).decompose(block, evidence)
    counts = [len(_tokens(block, _array(evidence.sample_TD), expert)) for expert in range(3)]
    gate_up, down = factors.materialize()
    rebuilt = replace(block, gate_up_EFD=gate_up, down_EDF=down)
    for matrix in range(3):
        base = np.zeros_like(_weights(block, 0)[matrix])
        for expert in range(3):
            base += counts[expert] / sum(counts) * _weights(block, expert)[matrix]
        assert _close(_array((*factors.base.of_inputs, factors.base.down_DF)[matrix]), base, 1e-6)
        for expert in range(3):
            own, inputs = _matrices_and_inputs(block, evidence, expert)[matrix]
            assert _close(_weights(rebuilt, expert)[matrix], base + _published(own - base, inputs, _RANK))


def test_deltas_of_identical_experts_are_nothing(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    same = replace(block, gate_up_EFD=block.gate_up_EFD[[1, 1, 1]].float(), down_EDF=block.down_EDF[[1, 1, 1]].float())
    assert max(relative_errors(same, D2Moe(1).decompose(same, evidence))) < 1e-6
    assert min(relative_errors(same, ActivationSvd(1).decompose(same, evidence))) > 0.1


def test_an_unused_expert_has_no_part_in_the_base(trained: tuple[MoeBlock, Evidence]) -> None:
    block, _evidence = trained
    base = usage_weighted_base(block, torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64))
    assert torch.equal(base.of_inputs[0], block.gate(1))
    nobody = usage_weighted_base(block, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(nobody.down_DF, block.down_EDF.float().mean(0))
