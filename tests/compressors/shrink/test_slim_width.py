"""Width pruning inside experts: scores and least squares by their definitions, on trained blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compressors.model.errors import InputError
from compressors.model.sources.narrowed import narrowed_down
from compressors.shrink.moe_block import Evidence, MoeBlock, second_moment
from compressors.shrink.slim import check_width
from compressors.shrink.slim.width import SlimWidth, compensation

TrainedBlock = Callable[..., tuple[MoeBlock, Evidence]]


def _array(tensor: torch.Tensor) -> npt.NDArray[np.float64]:
    return tensor.double().numpy()


def _hidden(block: MoeBlock, evidence: Evidence, expert: int) -> npt.NDArray[np.float64]:
    """The expert's activations, token by token, of the tokens that have it among their top-k."""
    rows = []
    gate, up = np.split(_array(block.gate_up_EFD[expert]), 2)
    for x in _array(evidence.sample_TD):
        if expert in np.argsort(-(_array(block.router_ED) @ x))[: block.top_k]:
            gated = gate @ x
            rows.append(gated / (1 + np.exp(-gated)) * (up @ x))
    return np.array(rows)


def _first_tokens(evidence: Evidence, n_tokens: int) -> Evidence:
    return replace(evidence, inputs_TD=evidence.sample_TD[:n_tokens])


def _plain_slice(block: MoeBlock, slim: MoeBlock) -> MoeBlock:
    """``slim`` with the teacher's own columns in its down projections: the neurons are found by their gate rows."""
    columns = []
    for expert in range(block.n_experts):
        rows = {tuple(row): index for index, row in enumerate(block.gate(expert).tolist())}
        kept = [rows[tuple(row)] for row in slim.gate(expert).tolist()]
        columns.append(block.down(expert)[:, kept])
    return replace(slim, down_EDF=torch.stack(columns))


def _without_expert(block: MoeBlock, evidence: Evidence, expert: int) -> Evidence:
    """The sample without the tokens that chose the expert."""
    chose_it = (block.route(evidence.sample_TD).chosen_TK == expert).any(-1)
    return replace(evidence, inputs_TD=evidence.sample_TD[~chose_it])


@pytest.mark.parametrize(("expert", "width"), [(3, 96), (17, 33), (17, 1)])
def test_the_neurons_that_add_most_to_the_output_stay(
    fine_folder: Path, trained_block: TrainedBlock, expert: int, width: int
) -> None:
    block, evidence = trained_block(fine_folder, 2)
    evidence = _first_tokens(evidence, 1024)
    hidden, down = _hidden(block, evidence, expert), _array(block.down(expert))
    added = []
    for neuron in range(block.width):
        outputs = [activation * down[:, neuron] for activation in hidden[:, neuron]]
        added.append(np.mean([output @ output for output in outputs]) ** 0.5)
    kept = sorted(sorted(range(block.width), key=lambda neuron: -added[neuron])[:width])
    slim = SlimWidth(width)(block, evidence).block
    assert torch.equal(slim.gate(expert), block.gate(expert)[kept])
    assert torch.equal(slim.up(expert), block.up(expert)[kept])


def test_compensation_is_least_squares(coarse_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = trained_block(coarse_folder, 3)
    expert = int(evidence.statistics.count_E.argmax())
    hidden = _hidden(block, evidence, expert)
    kept = tuple(range(1, block.width, 3))
    assert len(hidden) > 3 * len(kept)
    ridge = 1e-10 * (hidden**2).sum()
    factors_RM = compensation(second_moment(torch.tensor(hidden)), kept, ridge)
    found = narrowed_down(block.down(expert), kept, factors_RM)
    expected = np.linalg.lstsq(hidden[:, kept], hidden @ _array(block.down(expert)).T, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("n_tokens", [4096, 200])
def test_the_ridge_pulls_towards_the_plain_slice(fine_folder: Path, trained_block: TrainedBlock, n_tokens: int) -> None:
    """Least squares with one more equation per kept neuron and output: its weight is what it was."""
    block, evidence = trained_block(fine_folder, 1)
    evidence = _first_tokens(evidence, n_tokens)
    slim = SlimWidth(48)(block, evidence).block
    sliced = _plain_slice(block, slim)
    for expert in (0, 9, 31):
        hidden, down, own = _hidden(block, evidence, expert), _array(block.down(expert)), _array(sliced.down(expert))
        gates = block.gate(expert).tolist()
        kept = [gates.index(row) for row in slim.gate(expert).tolist()]
        ridge = 100 * (hidden**2).mean() if len(hidden) else 1.0
        equations = np.vstack([hidden[:, kept], np.sqrt(ridge) * np.eye(len(kept))])
        targets = np.vstack([hidden @ down.T, np.sqrt(ridge) * own.T])
        expected = np.linalg.lstsq(equations, targets, rcond=None)[0].T
        np.testing.assert_allclose(slim.down(expert).numpy(), expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("width", [32, 64, 96])
def test_compensation_beats_plain_slicing_also_on_other_tokens(
    fine_folder: Path, trained_block: TrainedBlock, width: int
) -> None:
    block, evidence = trained_block(fine_folder, 4)
    seen_TD, unseen_TD = evidence.sample_TD[:3072], evidence.sample_TD[3072:]
    slim = SlimWidth(width)(block, replace(evidence, inputs_TD=seen_TD)).block
    sliced = _plain_slice(block, slim)
    for inputs_TD in (seen_TD, unseen_TD):
        full_TD = block.forward(inputs_TD)
        slim_error, sliced_error = ((other.forward(inputs_TD) - full_TD).norm() for other in (slim, sliced))
        assert slim_error < 0.9 * sliced_error


def test_full_width_is_the_block_itself(fine_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = trained_block(fine_folder, 0)
    result = SlimWidth(block.width)(block, evidence)
    assert result.block is block
    assert not result.changed_experts
    assert result.groups == tuple((expert,) for expert in range(block.n_experts))


def test_every_expert_is_narrower_and_the_router_is_not_touched(
    coarse_folder: Path, trained_block: TrainedBlock
) -> None:
    block, evidence = trained_block(coarse_folder, 0)
    result = SlimWidth(96)(block, _first_tokens(evidence, 1024))
    assert result.block.width == 96
    assert result.block.gate_up_EFD.shape == (8, 192, 256)
    assert result.block.gate_up_EFD.dtype == block.gate_up_EFD.dtype
    assert result.block.down_EDF.shape == (8, 256, 96)
    assert result.block.router_ED is block.router_ED
    assert not result.router_changed
    assert result.changed_experts == frozenset(range(8))
    assert result.groups == tuple((expert,) for expert in range(8))


def test_an_expert_without_tokens_is_sliced_by_its_weights(fine_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = trained_block(fine_folder, 0)
    evidence = _without_expert(block, evidence, 12)
    assert len(evidence.sample_TD) > 1000
    gate, up, down = _array(block.gate(12)), _array(block.up(12)), _array(block.down(12))
    norms = [
        np.linalg.norm(gate[neuron]) * np.linalg.norm(up[neuron]) * np.linalg.norm(down[:, neuron])
        for neuron in range(block.width)
    ]
    kept = sorted(sorted(range(block.width), key=lambda neuron: -norms[neuron])[:40])
    slim = SlimWidth(40)(block, evidence).block
    assert torch.equal(slim.gate(12), block.gate(12)[kept])
    assert torch.equal(slim.down(12), block.down(12)[:, kept])


def test_of_equal_neurons_the_first_stay(fine_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = trained_block(fine_folder, 0)
    block = block.keep([4])
    alike = list(range(64)) * 2  # neuron 64 + f is neuron f
    rows = alike + [block.width + neuron for neuron in alike]
    twins = replace(block, gate_up_EFD=block.gate_up_EFD[:, rows], down_EDF=block.down_EDF[..., alike])
    slim = SlimWidth(63)(twins, _first_tokens(evidence, 512)).block
    # pairs of equal importance: of the weakest pair that is kept only the first neuron, which is in the lower half
    gates = [tuple(row) for row in slim.gate(0).tolist()]
    half = [tuple(row) for row in block.gate(0)[:64].tolist()]
    lower, upper = gates[: len(set(gates))], gates[len(set(gates)) :]
    assert set(upper) < set(lower)
    assert len(lower) - len(upper) == 1
    assert [row for row in half if row in set(lower)] == lower


@pytest.mark.parametrize("width", [0, -32, 129])
def test_impossible_widths_are_refused(fine_folder: Path, trained_block: TrainedBlock, width: int) -> None:
    with pytest.raises(InputError, match=rf"{width} of 128 .* from 1 to 128"):
        SlimWidth(width)(*trained_block(fine_folder, 0))


def test_gguf_takes_whole_blocks_of_32() -> None:
    check_width(96, 128, for_gguf=True)
    check_width(100, 128)
    with pytest.raises(InputError, match=r"100 wide.* multiple of 32 up to 128"):
        check_width(100, 128, for_gguf=True)
    with pytest.raises(InputError, match="160 of 128"):
        check_width(160, 128, for_gguf=True)
