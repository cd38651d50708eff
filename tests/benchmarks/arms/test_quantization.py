"""GPTQ, AWQ and rounding to nearest by their definitions, on trained blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from benchmarks.arms import Awq, Gptq, RoundToNearest
from compressors.model.errors import InputError
from compressors.quantize import GGMLQuantizationType, dequantize_rows
from compressors.quantize.kernels import quantize_rows
from compressors.shrink.moe_block import Evidence, Method, MoeBlock
from compressors.shrink.slim.width import SlimWidth

TrainedBlock = Callable[..., tuple[MoeBlock, Evidence]]
Array = npt.NDArray[np.float64]
_MATRICES = ("gate", "up", "down")


def _small(trained_block: TrainedBlock, folder: Path, n_tokens: int = 1024) -> tuple[MoeBlock, Evidence]:
    """Four experts of a layer, two for each token."""
    block, evidence = trained_block(folder, 3)
    return replace(block.keep([1, 4, 5, 7]), top_k=2), replace(evidence, inputs_TD=evidence.sample_TD[:n_tokens])


def _inputs(block: MoeBlock, inputs_TD: torch.Tensor, expert: int) -> dict[str, Array]:
    """The inputs of each matrix of an expert, from the tokens that have it among their top-k."""
    router = block.router_ED.numpy()
    x = np.array([x for x in inputs_TD.numpy() if expert in np.argsort(-(router @ x))[: block.top_k]], dtype=float)
    gated = x @ block.gate(expert).double().numpy().T
    hidden = gated / (1 + np.exp(-gated)) * (x @ block.up(expert).double().numpy().T)
    return {"gate": x, "up": x, "down": hidden}


def _errors(block: MoeBlock, changed: MoeBlock, inputs_TD: torch.Tensor) -> Iterator[float]:
    """Squared output error of every matrix of every expert."""
    for expert in range(block.n_experts):
        inputs = _inputs(block, inputs_TD, expert)
        for name in _MATRICES:
            difference = getattr(changed, name)(expert) - getattr(block, name)(expert)
            yield float(((inputs[name] @ difference.double().numpy().T) ** 2).sum())


def _rounded(weights: Array) -> Array:
    """32 weights on 16 steps, of which the weight of largest magnitude is the lowest."""
    largest = max(weights, key=abs)
    if largest == 0:
        return weights
    scale = largest / -8
    return np.array([min(max(round(weight / scale), -8), 7) * scale for weight in weights])


def _rounded_matrix(weights: Array) -> Array:
    return np.array(
        [np.concatenate([_rounded(row[start : start + 32]) for start in range(0, len(row), 32)]) for row in weights]
    )


def test_rounding_to_nearest_is_its_definition(fine_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = _small(trained_block, fine_folder)
    result = RoundToNearest()(block, evidence)
    for name in _MATRICES:
        expected = _rounded_matrix(getattr(block, name)(2).numpy())
        np.testing.assert_allclose(getattr(result.block, name)(2).numpy(), expected, rtol=1e-6)
    assert result.changed_experts == frozenset(range(4))
    assert result.groups == ((0,), (1,), (2,), (3,))


def test_the_grid_is_that_of_q4_0(fine_folder: Path, trained_block: TrainedBlock) -> None:
    """ggml keeps its scales in half precision and rounds halves up: a few weights end one step away."""
    block, evidence = _small(trained_block, fine_folder)
    ours = RoundToNearest()(block, evidence).block.down(1).numpy()
    quantized = quantize_rows(block.down(1), GGMLQuantizationType.Q4_0, name="down")
    theirs = dequantize_rows(quantized, GGMLQuantizationType.Q4_0, block.width)
    largest = abs(ours.reshape(-1, 32)).max(1, keepdims=True)
    steps = abs(ours - theirs).reshape(-1, 32) / (largest / 8)
    assert steps.max() < 1.01
    assert (steps > 0.01).mean() < 0.01


def _gptq_by_definition(weights: Array, inputs: Array) -> Array:
    """Optimal Brain Surgeon over the columns in order, with an inverse of its own at each."""
    weights = weights.copy()
    n = weights.shape[1]
    hessian = sum(np.outer(x, x) for x in inputs)
    hessian = hessian + 0.01 * np.trace(hessian) / n * np.eye(n)
    for j in range(n):
        inverse = np.linalg.inv(hessian[j:, j:])
        if j % 32 == 0:
            scales = [max(row[j : j + 32], key=abs) / -8 for row in weights]
        for row, scale in zip(weights, scales, strict=True):
            value = min(max(round(row[j] / scale), -8), 7) * scale
            row[j:] -= (row[j] - value) / inverse[0, 0] * inverse[0]
            row[j] = value
    return weights


@pytest.mark.parametrize("name", _MATRICES)
def test_gptq_is_its_algorithm(fine_folder: Path, trained_block: TrainedBlock, name: str) -> None:
    block, evidence = _small(trained_block, fine_folder)
    found = getattr(Gptq()(block, evidence).block, name)(1).numpy()
    inputs = _inputs(block, evidence.sample_TD, 1)[name]
    expected = _gptq_by_definition(getattr(block, name)(1).double().numpy(), inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("model", ["fine", "olmoe"])
def test_gptq_beats_rounding_to_nearest(
    request: pytest.FixtureRequest, trained_block: TrainedBlock, model: str
) -> None:
    block, evidence = trained_block(request.getfixturevalue(f"{model}_folder"), 1)
    block = replace(block.keep([1, 4, 5, 7]), top_k=2)
    seen_TD, unseen_TD = evidence.sample_TD[:3072], evidence.sample_TD[3072:]
    evidence = replace(evidence, inputs_TD=seen_TD)
    by_gptq, rounded = (method(block, evidence).block for method in (Gptq(), RoundToNearest()))
    errors = zip(_errors(block, by_gptq, seen_TD), _errors(block, rounded, seen_TD), strict=True)
    assert all(own < other for own, other in errors)
    full_TD = block.forward(unseen_TD)
    assert (by_gptq.forward(unseen_TD) - full_TD).norm() < (rounded.forward(unseen_TD) - full_TD).norm()


def test_gptq_weights_are_on_a_grid_of_16_values(fine_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = _small(trained_block, fine_folder)
    for matrix in Gptq()(block, evidence).block.gate_up_EFD[0]:
        assert all(len(group.unique()) <= 16 for group in matrix.split(32))


@pytest.mark.parametrize("name", ["gate", "down"])
def test_awq_takes_the_best_scale_of_its_grid(fine_folder: Path, trained_block: TrainedBlock, name: str) -> None:
    block, evidence = _small(trained_block, fine_folder)
    found = getattr(Awq()(block, evidence).block, name)(0).numpy()
    x, weights = _inputs(block, evidence.sample_TD, 0)[name], getattr(block, name)(0).double().numpy()
    candidates, errors = [], []
    for step in range(21):
        scales = abs(x).mean(0) ** (step / 20)
        candidates.append(_rounded_matrix(weights * scales) / scales)
        errors.append((((candidates[-1] - weights) @ x.T) ** 2).sum())
    best = int(np.argmin(errors))
    np.testing.assert_allclose(found, candidates[best], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["fine", "olmoe"])
def test_awq_is_never_worse_than_rounding_to_nearest(
    request: pytest.FixtureRequest, trained_block: TrainedBlock, model: str
) -> None:
    block, evidence = trained_block(request.getfixturevalue(f"{model}_folder"), 2)
    block = replace(block.keep([0, 2, 3, 6]), top_k=2)
    by_awq, rounded = (method(block, evidence).block for method in (Awq(), RoundToNearest()))
    errors = [list(_errors(block, changed, evidence.sample_TD)) for changed in (by_awq, rounded)]
    assert all(own <= other * (1 + 1e-6) for own, other in zip(*errors, strict=True))
    assert sum(errors[0]) < sum(errors[1])


@pytest.mark.parametrize("method", [Awq(), Gptq()])
def test_an_expert_without_tokens_is_rounded_to_nearest(
    fine_folder: Path, trained_block: TrainedBlock, method: Method
) -> None:
    block, evidence = _small(trained_block, fine_folder)
    chose_it = (block.route(evidence.sample_TD).chosen_TK == 2).any(-1)
    evidence = replace(evidence, inputs_TD=evidence.sample_TD[~chose_it])
    found, rounded = method(block, evidence).block, RoundToNearest()(block, evidence).block
    torch.testing.assert_close(found.gate_up_EFD[2], rounded.gate_up_EFD[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.down_EDF[2], rounded.down_EDF[2], rtol=1e-6, atol=0)
    assert not torch.equal(found.down_EDF[1], rounded.down_EDF[1])


@pytest.mark.parametrize("method", [Awq(), Gptq(), RoundToNearest()])
def test_a_width_without_groups_of_32_is_refused(
    fine_folder: Path, trained_block: TrainedBlock, method: Method
) -> None:
    block, evidence = _small(trained_block, fine_folder)
    narrow = SlimWidth(40)(block, evidence).block
    with pytest.raises(InputError, match=r"40 inputs.* multiple of 32"):
        method(narrow, evidence)


def test_a_group_of_zeros_stays_zero(fine_folder: Path, trained_block: TrainedBlock) -> None:
    block, evidence = _small(trained_block, fine_folder, 256)
    gate_up_EFD = block.gate_up_EFD.clone()
    gate_up_EFD[0, 3, 32:64] = 0
    for method in (RoundToNearest(), Awq()):
        found = method(replace(block, gate_up_EFD=gate_up_EFD), evidence).block
        assert not found.gate(0)[3, 32:64].any()
        assert found.gate_up_EFD.isfinite().all()
