"""Wanda and SparseGPT by their definitions, on trained blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.arms import Pattern, SparseGpt, Wanda
from compressors.model.errors import InputError
from compressors.shrink.moe_block import Evidence, Method, MoeBlock
from compressors.shrink.slim.width import SlimWidth

TrainedBlock = Callable[..., tuple[MoeBlock, Evidence]]
Array = npt.NDArray[np.float64]
_EXPERTS = (0, 5, 11, 20)


def _small(trained_block: TrainedBlock, folder: Path, n_tokens: int = 1024) -> tuple[MoeBlock, Evidence]:
    """Four experts of a layer, two for each token."""
    block, evidence = trained_block(folder, 3)
    return replace(block.keep(_EXPERTS), top_k=2), replace(evidence, inputs_TD=evidence.sample_TD[:n_tokens])


def _matrices(
    block: MoeBlock, changed: MoeBlock, inputs_TD: torch.Tensor, expert: int
) -> Iterator[tuple[Array, Array, Array]]:
    """(inputs, weights, changed weights) of gate, up and down."""
    inputs = []
    for x in inputs_TD.numpy():
        if expert in np.argsort(-(block.router_ED.numpy() @ x))[: block.top_k]:
            inputs.append(x)
    inputs_nD = torch.tensor(np.array(inputs))
    hidden_nF = torch.nn.functional.silu(inputs_nD @ block.gate(expert).T) * (inputs_nD @ block.up(expert).T)
    for name, activations in (("gate", inputs_nD), ("up", inputs_nD), ("down", hidden_nF)):
        weights, found = (getattr(one, name)(expert).double().numpy() for one in (block, changed))
        yield activations.double().numpy(), weights, found


def _in_fours(zeros: npt.NDArray[np.bool_]) -> set[int]:
    """How many of every four consecutive columns are set."""
    return set(zeros.reshape(-1, 4).sum(1).tolist())


@pytest.mark.parametrize("sparsity", [0.5, 0.3])
def test_wanda_drops_the_lowest_scores_of_each_row(
    fine_folder: Path, trained_block: TrainedBlock, sparsity: float
) -> None:
    block, evidence = _small(trained_block, fine_folder)
    changed = Wanda(sparsity)(block, evidence).block
    for inputs, weights, found in _matrices(block, changed, evidence.sample_TD, 2):
        n_zeros = round(sparsity * weights.shape[1])
        for row, found_row in zip(weights, found, strict=True):
            scores = [abs(weight) * np.sqrt((inputs[:, j] ** 2).sum()) for j, weight in enumerate(row)]
            expected = row.copy()
            expected[sorted(range(len(row)), key=lambda j: (scores[j], -j))[:n_zeros]] = 0
            np.testing.assert_array_equal(found_row, expected)


def test_wanda_keeps_the_two_best_of_every_four(fine_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = _small(trained_block, fine_folder)
    changed = Wanda(0.5, "2:4")(block, evidence).block
    for inputs, weights, found in _matrices(block, changed, evidence.sample_TD, 0):
        norms = [np.sqrt((inputs[:, j] ** 2).sum()) for j in range(inputs.shape[1])]
        for row, found_row in zip(weights, found, strict=True):
            expected = np.zeros_like(row)
            for start in range(0, len(row), 4):
                four = sorted(range(start, start + 4), key=lambda j: (-abs(row[j]) * norms[j], j))
                expected[four[:2]] = row[four[:2]]
            np.testing.assert_array_equal(found_row, expected)


def _sparsegpt_by_definition(weights: Array, inputs: Array, together: int, n_zeros_of: Callable[[int], int]) -> Array:
    """Algorithm 1 with an inverse of its own at each column. ``together`` columns share a mask: over all rows, or each
    row by itself where ``together`` is 4."""
    weights = weights.copy()
    n = weights.shape[1]
    hessian = sum(np.outer(x, x) for x in inputs)
    hessian = hessian + 0.01 * np.trace(hessian) / n * np.eye(n)
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(n)]
    zeros: set[tuple[int, int]] = set()
    for j in range(n):
        if j % together == 0:
            columns = range(j, min(j + together, n))
            rows_of_masks = [[row] for row in range(len(weights))] if together == 4 else [range(len(weights))]
            for rows in rows_of_masks:
                scored = [(weights[r, c] ** 2 / inverses[c][0, 0], -c, r, c) for r in rows for c in columns]
                zeros.update((r, c) for _, _, r, c in sorted(scored)[: n_zeros_of(len(scored))])
        for r in range(len(weights)):
            if (r, j) in zeros:
                weights[r, j:] -= weights[r, j] / inverses[j][0, 0] * inverses[j][0]
                weights[r, j] = 0
    return weights


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, "unstructured"), (0.7, "unstructured"), (0.5, "2:4")])
def test_sparsegpt_is_its_algorithm(
    fine_folder: Path, trained_block: TrainedBlock, sparsity: float, pattern: Pattern
) -> None:
    block, evidence = _small(trained_block, fine_folder)
    changed = SparseGpt(sparsity, pattern)(block, evidence).block
    for inputs, weights, found in _matrices(block, changed, evidence.sample_TD, 1):
        expected = _sparsegpt_by_definition(
            weights, inputs, 4 if pattern == "2:4" else 128, lambda n_scores: round(sparsity * n_scores)
        )
        np.testing.assert_array_equal(found == 0, expected == 0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("method", [Wanda(0.5, "2:4"), SparseGpt(0.5, "2:4")])
def test_two_of_every_four_are_zero_everywhere(fine_folder: Path, trained_block: TrainedBlock, method: Method) -> None:
    block, evidence = trained_block(fine_folder, 0)
    result = method(block, evidence)
    for matrices in (result.block.gate_up_EFD, result.block.down_EDF):
        assert _in_fours((matrices == 0).numpy()) == {2}
    assert result.changed_experts == frozenset(range(32))
    assert result.groups == tuple((expert,) for expert in range(32))
    assert result.block.router_ED is block.router_ED


def test_sparsegpt_beats_wanda_and_wanda_beats_magnitude(fine_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = _small(trained_block, fine_folder, 2048)
    results = [method(block, evidence).block for method in (SparseGpt(0.5), Wanda(0.5))]
    errors = np.zeros(3)
    for expert in range(block.n_experts):
        pairs = zip(*(_matrices(block, result, evidence.sample_TD, expert) for result in results), strict=True)
        for (inputs, weights, by_sparsegpt), (_, _, by_wanda) in pairs:
            by_magnitude = np.where(abs(weights) > np.median(abs(weights)), weights, 0)
            found = (by_sparsegpt, by_wanda, by_magnitude)
            own = [(((weights - other) @ inputs.T) ** 2).sum() for other in found]
            assert own[0] < own[2]
            errors += own
            assert (by_sparsegpt == 0).sum() == (by_wanda == 0).sum() == weights.size // 2
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] < errors[2]


@pytest.mark.parametrize("method", [Wanda(0.5), SparseGpt(0.5, "2:4"), SparseGpt(0.25)])
def test_an_expert_without_tokens_is_pruned_by_magnitude(
    fine_folder: Path, trained_block: TrainedBlock, method: Wanda | SparseGpt
) -> None:
    block, evidence = _small(trained_block, fine_folder)
    chose_it = (block.route(evidence.sample_TD).chosen_TK == 3).any(-1)
    found = method(block, replace(evidence, inputs_TD=evidence.sample_TD[~chose_it])).block.down(3)
    weights, is_zero = block.down(3), found == 0
    assert torch.equal(found[~is_zero], weights[~is_zero])
    shapes = {Wanda(0.5): (256, 128), SparseGpt(0.5, "2:4"): (-1, 4), SparseGpt(0.25): (1, -1)}
    for row, zeros_of_row in zip(weights.reshape(shapes[method]), is_zero.reshape(shapes[method]), strict=True):
        assert row[zeros_of_row].abs().max() <= row[~zeros_of_row].abs().min()
        assert zeros_of_row.sum() == len(row) * method.sparsity


@pytest.mark.parametrize("method", [Wanda, SparseGpt])
def test_impossible_sparsities_are_refused(
    fine_folder: Path, trained_block: TrainedBlock, method: type[Wanda] | type[SparseGpt]
) -> None:
    for sparsity in (0.0, 1.0, -0.1):
        with pytest.raises(InputError, match=str(sparsity)):
            method(sparsity)
    with pytest.raises(InputError, match=r"0\.6.*2:4"):
        method(0.6, "2:4")
    with pytest.raises(InputError, match="4:8"):
        method(0.5, "4:8")  # type: ignore[arg-type]
    block, evidence = _small(trained_block, fine_folder, 64)
    narrow = SlimWidth(30)(block, evidence).block
    with pytest.raises(InputError, match=r"30 inputs.* multiple of 4"):
        method(0.5, "2:4")(narrow, evidence)


def test_of_equal_scores_the_first_stays(fine_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = _small(trained_block, fine_folder, 64)
    alike = replace(block, gate_up_EFD=torch.ones_like(block.gate_up_EFD), down_EDF=torch.ones_like(block.down_EDF))
    found = Wanda(0.5, "2:4")(alike, evidence).block.down(0)  # all hidden neurons are the same neuron
    assert torch.equal(found[0, :8], torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0]))
