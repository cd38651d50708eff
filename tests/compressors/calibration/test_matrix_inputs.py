"""The matrices of a layer are found by its description, whatever their names and places."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from compressors.calibration.sizes import input_sizes, matrices_beside_experts
from compressors.calibration.statistics import StatisticsCollector, importance
from compressors.model.config.reading import read_spec
from compressors.model.description.feed_forward import Dense
from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import GgufTensor, Kind, TensorSpec
from compressors.model.sources.student import ExpertMap, LayerMap

_GGUF = GgufTensor("")


class _Layer(nn.Module):
    """One matrix pair in front, a bias, and a dense feed-forward behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, states_BTD: torch.Tensor) -> torch.Tensor:
        self.first(states_BTD)
        self.second(states_BTD)
        normed = self.norm(states_BTD)
        return states_BTD + self.down(self.gate(normed) * self.up(normed))


def _tensor(role: Role, name: str, *shape: str, kind: Kind = Kind.MATRIX, shares: Role | None = None) -> TensorSpec:
    return TensorSpec(role, f"model.layers.{{layer}}.{name}", shape, _GGUF, kind, shares_input_of=shares)


@pytest.fixture
def spec(fine_folder: Path) -> ModelSpec:
    """A model of that one layer."""
    model = read_spec(fine_folder)
    tensors = (
        _tensor(Role.QUERY, "first.weight", "6", "D"),
        _tensor(Role.QUERY_BIAS, "first.bias", "6", kind=Kind.VECTOR),
        _tensor(Role.KEY, "second.weight", "4", "D", shares=Role.QUERY),
        _tensor(Role.MOE_NORM, "norm.weight", "D", kind=Kind.NORM),
        _tensor(Role.SHARED_GATE, "gate.weight", "F", "D"),
        _tensor(Role.SHARED_UP, "up.weight", "F", "D", shares=Role.SHARED_GATE),
        _tensor(Role.SHARED_DOWN, "down.weight", "D", "F"),
    )
    layer = LayerSpec(model.layers[0].mixer, Dense(12), 8, tensors)
    return replace(model, hidden_size=8, layers=(layer,))


def test_inputs_go_by_the_first_matrix_that_has_them(spec: ModelSpec) -> None:
    (layer,) = spec.layers
    roles = {tensor.role for tensor in matrices_beside_experts(layer)}
    assert roles == {Role.QUERY, Role.KEY, Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN}
    assert input_sizes(layer) == {Role.QUERY: 8, Role.SHARED_GATE: 8, Role.SHARED_DOWN: 12}


@torch.no_grad()
def test_a_layer_without_routed_experts_has_the_statistics_of_its_matrices(spec: ModelSpec) -> None:
    module = _Layer().eval()
    states_BTD = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    collector = StatisticsCollector(spec)
    with collector.observe(0, module):
        output_BTD = module(states_BTD)
    module(states_BTD)  # is not watched any more
    statistics = collector.take(0)
    normed_TD = module.norm(states_BTD).flatten(0, 1)
    hidden_TF = module.gate(normed_TD) * module.up(normed_TD)
    cosines = torch.nn.functional.cosine_similarity(states_BTD, output_BTD, dim=-1).sum().item()
    assert statistics.n_tokens == 10
    assert statistics.moe_cosine_sum.item() == statistics.block_cosine_sum.item() == pytest.approx(cosines, rel=1e-5)
    matrix = importance([statistics], ExpertMap(32, (LayerMap(0, ()),)), spec)
    expected = {
        Role.QUERY: states_BTD.flatten(0, 1),
        Role.KEY: states_BTD.flatten(0, 1),
        Role.SHARED_GATE: normed_TD,
        Role.SHARED_UP: normed_TD,
        Role.SHARED_DOWN: hidden_TF,
    }
    assert matrix.keys() == {(role, 0) for role in expected}
    for role, inputs_TN in expected.items():
        torch.testing.assert_close(matrix[role, 0], inputs_TN.square().mean(0))
