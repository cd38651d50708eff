"""MoBE against its definition, written out expert by expert, on trained blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from compressors.model.errors import InputError
from compressors.shrink.decompose import Mobe, SharedBases
from compressors.shrink.decompose.mobe import Activation
from compressors.shrink.moe_block import Evidence, MoeBlock
from tests.compressors.shrink.factor_errors import relative_errors


@pytest.fixture(scope="module")
def trained(fine_folder: Path, trained_block: Callable[..., tuple[MoeBlock, Evidence]]) -> tuple[MoeBlock, Evidence]:
    """Ten experts of a layer, so that each fit is quick and takes more than one chunk of experts."""
    block, evidence = trained_block(fine_folder, 3)
    return block.keep(range(10)), evidence


def _act(values: np.ndarray, activation: Activation) -> np.ndarray:
    return np.tanh(values) if activation == "tanh" else values / (1 + np.exp(-values))


def _rebuild(bases: SharedBases) -> np.ndarray:
    """W_i = A_i act(sum over k of alpha_ik B_k), one expert and one basis at a time."""
    own, mix, shared = (part.double().numpy() for part in (bases.own_EFr, bases.mix_EM, bases.bases_MrD))
    rebuilt = []
    for expert in range(len(own)):
        mixed = np.zeros_like(shared[0])
        for basis in range(len(shared)):
            mixed += mix[expert, basis] * shared[basis]
        rebuilt.append(own[expert] @ _act(mixed, bases.activation))
    return np.stack(rebuilt)


def _fit_by_definition(
    weights: torch.Tensor, groups: list[list[int]], rank: int, steps: int, activation: Activation
) -> torch.Tensor:
    """The published fit with all experts at once and Adam by its formula: the weights after some steps."""
    act = torch.tanh if activation == "tanh" else torch.nn.functional.silu
    unit = weights.std()
    targets = weights / unit
    own, logits, shared = torch.zeros(len(weights), weights.shape[1], rank), torch.zeros(len(weights), len(groups)), []
    for index, group in enumerate(groups):
        left, values, right = torch.linalg.svd(torch.cat([targets[expert] for expert in group]), full_matrices=False)
        shared.append(right[:rank])
        for place, expert in enumerate(group):
            rows = slice(place * weights.shape[1], (place + 1) * weights.shape[1])
            own[expert] = left[rows, :rank] @ torch.diag(values[:rank])
            logits[expert, index] = 1
    parameters = [own.requires_grad_(), logits.requires_grad_(), torch.stack(shared).requires_grad_()]
    momenta = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in parameters]
    states = []
    for step in range(1, steps + 2):
        mixed = torch.einsum("em,mrd->erd", parameters[1].softmax(-1), parameters[2])
        rebuilt = parameters[0] @ act(mixed)
        loss = torch.nn.functional.mse_loss(rebuilt, targets)
        states.append((loss.item(), rebuilt.detach() * unit))
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient, (first, second) in zip(parameters, gradients, momenta, strict=True):
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                direction = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                parameter.sub_(0.07 * direction)
    return min(states, key=lambda state: state[0])[1]


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_the_fit_is_the_published_one(activation: Activation, trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    groups = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]  # ten experts do not divide by three bases: groups of 4, 3 and 3
    factors = Mobe(3, rank=16, steps=4, activation=activation).decompose(block, evidence)
    gates = torch.stack([block.gate(expert) for expert in range(10)])
    ups = torch.stack([block.up(expert) for expert in range(10)])
    for bases, weights in zip(factors.of_inputs, (gates, ups), strict=True):
        expected = _fit_by_definition(weights, groups, 16, 4, activation)
        # Adam divides gradients by their own size, also those that are nothing but float32 rounding
        assert (bases.product() - expected).norm() <= 1e-3 * expected.norm()
        assert (bases.product() - weights).norm() < 0.85 * weights.norm()


def test_the_result_is_the_definition_and_its_error_is_reported(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    method = Mobe(4, rank=48, steps=30)
    factors, compressed = method.decompose(block, evidence), method(block, evidence)
    assert torch.all(factors.of_inputs[0].mix_EM > 0)
    torch.testing.assert_close(factors.of_inputs[0].mix_EM.sum(-1), torch.ones(10))
    errors = relative_errors(block, factors)
    width = block.width
    for bases, rows, error in (
        (factors.of_inputs[0], slice(0, width), errors.gate),
        (factors.of_inputs[1], slice(width, None), errors.up),
    ):
        expected, old = _rebuild(bases), block.gate_up_EFD[:, rows].double().numpy()
        new = compressed.block.gate_up_EFD[:, rows].double().numpy()
        assert np.linalg.norm(new - expected) <= 1e-5 * np.linalg.norm(expected)
        assert error == pytest.approx(np.linalg.norm(expected - old) / np.linalg.norm(old), rel=1e-4)
    assert errors.down == 0
    assert torch.equal(compressed.block.down_EDF, block.down_EDF)
    assert compressed.groups == tuple((expert,) for expert in range(10))
    assert compressed.changed_experts == set(range(10))
    assert not compressed.router_changed
    assert compressed.block.router_ED is block.router_ED


def test_the_error_falls_with_steps_and_the_fit_repeats(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    errors = []
    for steps in (1, 5, 20):
        first, second = (Mobe(4, rank=64, steps=steps).decompose(block, evidence) for _ in range(2))
        assert torch.equal(first.materialize()[0], second.materialize()[0])
        errors.append(relative_errors(block, first))
    for earlier, later in pairwise(errors):
        assert later.gate < 0.95 * earlier.gate
        assert later.up < 0.95 * earlier.up


def test_gradients_may_be_switched_off_around_it(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    with torch.no_grad():
        factors = Mobe(2, rank=8, steps=3).decompose(block, evidence)
    assert torch.equal(
        factors.of_inputs[0].product(), Mobe(2, rank=8, steps=3).decompose(block, evidence).of_inputs[0].product()
    )
    assert not factors.of_inputs[0].product().requires_grad


def test_a_basis_for_each_expert_can_represent_them(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    few = block.keep(range(3))
    start, end = (relative_errors(few, Mobe(3, steps=steps).decompose(few, evidence)) for steps in (1, 50))
    assert end.gate < 0.1 * start.gate
    assert end.up < 0.1 * start.up


def test_rank_is_the_width_unless_given(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    assert Mobe(2, steps=1).decompose(block, evidence).of_inputs[0].bases_MrD.shape == (2, 128, 256)
    wide = replace(block, gate_up_EFD=block.gate_up_EFD.repeat(1, 4, 1), down_EDF=block.down_EDF.repeat(1, 1, 4))
    assert Mobe(1, steps=1).decompose(wide, evidence).of_inputs[1].own_EFr.shape == (10, 512, 256)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Mobe(0), "0 bases"),
        (Mobe(11), "11 bases .* 10 experts"),
        (Mobe(2, rank=129), "rank 129 .* 1 to 128"),
        (Mobe(2, steps=0), "0 steps"),
        (Mobe(2, learning_rate=0.0), "rate 0.0"),
    ],
)
def test_impossible_targets_are_refused(method: Mobe, message: str, trained: tuple[MoeBlock, Evidence]) -> None:
    with pytest.raises(InputError, match=message):
        method(*trained)


def test_the_best_state_is_kept_when_later_steps_are_worse(trained: tuple[MoeBlock, Evidence]) -> None:
    block, evidence = trained
    few = block.keep(range(2))
    errors = [
        relative_errors(few, Mobe(1, rank=16, steps=steps, learning_rate=30.0).decompose(few, evidence)).gate
        for steps in (1, 2, 3)
    ]
    assert errors[0] == errors[1] == errors[2] < 1
