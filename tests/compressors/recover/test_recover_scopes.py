"""The tensors of each scope, and the memory to train them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressors.calibration.statistics import LayerStatistics
from compressors.model.description.feed_forward import Routed, Shared
from compressors.model.description.roles import Role
from compressors.model.description.tensors import GgufTensor, Kind, TensorSpec
from compressors.model.errors import InputError
from compressors.model.running.memory import MemoryLimit
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.recover.objectives import NextToken
from compressors.recover.schedule import Schedule
from compressors.recover.scopes import Scope, expert_usage, scaled_matrices
from compressors.recover.trained_student import TrainedStudent
from compressors.recover.training import Training
from compressors.recover.training_memory import refuse_too_large, training_bytes


@pytest.fixture
def student(fine_folder: Path) -> Student:
    """Layers that differ: few experts, none, a single one, narrow ones."""
    everything = tuple((expert,) for expert in range(32))
    layers = (
        LayerMap(0, ((5,), (0, 9), (7,))),
        LayerMap(1, ()),
        LayerMap(3, everything, 32),
        LayerMap(4, ((6,),)),
    )
    student = Student(open_source(fine_folder), ExpertMap(32, layers))
    narrow = {
        student.name(role, 2, expert): torch.zeros((256, 32) if role is Role.EXPERT_DOWN else (32, 256))
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
        for expert in range(32)
    }
    return student.with_overlay(narrow)


def test_most_used_experts_with_ties_to_the_lower_index() -> None:
    usage_E = torch.tensor([3.0, 5.0, 5.0, 0.0, 5.0])
    assert Scope.most_used(2).experts(usage_E) == (1, 2)
    assert Scope.most_used(4).experts(usage_E) == (0, 1, 2, 4)
    assert Scope.most_used(9).experts(usage_E) == (0, 1, 2, 3, 4)  # a layer that has fewer
    assert Scope.all_experts().experts(usage_E) == (0, 1, 2, 3, 4)
    assert Scope.routers().experts(usage_E) == ()


def test_a_merged_expert_is_used_by_all_tokens_of_its_group(student: Student) -> None:
    spec = student.source.spec
    statistics = [
        replace(LayerStatistics.zeros(spec.layers[0]), count_E=torch.arange(32, dtype=torch.float64) * 10**layer)
        for layer in range(spec.n_layers)
    ]
    usage = expert_usage(statistics, student.experts)
    assert usage[0].tolist() == [5, 9, 7]
    assert usage[1].tolist() == []
    assert usage[2].tolist() == [expert * 1000 for expert in range(32)]
    assert usage[3].tolist() == [60000]


@pytest.mark.parametrize(
    "scope", [Scope.routers(), Scope.most_used(2), Scope.all_experts(), Scope.adapters(5)], ids=lambda scope: scope.name
)
def test_bytes_are_those_of_the_tensors(student: Student, scope: Scope) -> None:
    usage = [torch.ones(student.spec.layers[layer].n_experts) for layer in range(4)]
    trained = TrainedStudent(student, scope, usage=usage)
    n_bytes = [0] * 4
    for (_, layer), tensor in trained.parameters.items():
        assert tensor.dtype == torch.float32
        n_bytes[layer] += tensor.nbytes
    found = training_bytes(scope, student.spec)
    assert n_bytes[1] == 0  # it has no experts
    assert (found.weights, found.gradients, found.moments) == (sum(n_bytes), sum(n_bytes), 2 * sum(n_bytes))
    assert found.passing == max(n_bytes)
    assert found.total == 4 * sum(n_bytes) + max(n_bytes)


def test_only_the_most_used_need_counts(student: Student) -> None:
    with pytest.raises(ValueError, match="usage"):
        TrainedStudent(student, Scope.most_used(2))
    assert TrainedStudent(student, Scope.all_experts()).parameters


def test_a_scope_that_does_not_fit_the_memory_is_refused_before_it_starts(student: Student, tmp_path: Path) -> None:
    whole, adapters = Scope.all_experts(), Scope.adapters(1)
    itemsize = student.source.dtype.itemsize
    between = training_bytes(whole, student.spec).total - 1
    room = 0
    with pytest.raises(InputError, match="adapters"):
        refuse_too_large(whole, student.spec, itemsize, between)
    needed = 10**12
    while needed > room + 1:  # the smallest limit under which adapters may begin
        middle = (room + needed) // 2
        try:
            refuse_too_large(adapters, student.spec, itemsize, middle)
            needed = middle
        except InputError:
            room = middle
    extra = training_bytes(whole, student.spec).total - training_bytes(adapters, student.spec).total
    refuse_too_large(whole, student.spec, itemsize, needed + extra)
    limit = MemoryLimit(needed + extra - 1, tmp_path)
    tokens_BT = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(InputError, match=r"router \+ all experts needs .* train adapters"):
        Training(student, tokens_BT, NextToken(), Schedule(1, 1e-3, 1), scope=whole, limit=limit)
    Training(student, tokens_BT, NextToken(), Schedule(1, 1e-3, 1), scope=adapters, limit=limit)


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (Scope.most_used(33), "33 experts .* there are 32"),
        (Scope.most_used(-1), "-1 experts"),
        (Scope.adapters(0), "rank 0.* from 1 to"),
        (Scope.adapters(1000), "rank 1000.* from 1 to"),
    ],
)
def test_impossible_scopes_are_refused(student: Student, scope: Scope, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainedStudent(student, scope)


def _tensor(role: Role, *shape: str, kind: Kind, experts_axis: int | None = None) -> TensorSpec:
    name = f"model.layers.{{layer}}.{role.name}"
    return TensorSpec(role, name, shape, GgufTensor(""), kind, experts_axis=experts_axis)


def test_parts_beside_routed_experts_are_trained_with_everything_alone(fine_folder: Path) -> None:
    """A router's bias goes with the router; a selection bias, which no gradient reaches, with nothing."""
    spec = open_source(fine_folder).spec
    layer = spec.layers[0]
    assert isinstance(layer.feed_forward, Routed)
    more = (
        _tensor(Role.QUERY_BIAS, "Q", kind=Kind.VECTOR),
        _tensor(Role.ROUTER_BIAS, "E", kind=Kind.ROUTER, experts_axis=0),
        _tensor(Role.SELECTION_BIAS, "E", kind=Kind.SELECTION, experts_axis=0),
        _tensor(Role.SHARED_ROUTER, "1", "D", kind=Kind.ROUTER),
        _tensor(Role.SHARED_DOWN, "D", "S", kind=Kind.MATRIX),
    )
    feed_forward = replace(layer.feed_forward, shared=Shared(96, is_gated=True))
    wide = replace(layer, feed_forward=feed_forward, tensors=(*layer.tensors, *more))
    grown = {
        scope: scope.parameters(wide, lambda _role: 32) - scope.parameters(layer, lambda _role: 32)
        for scope in (Scope.routers(), Scope.routers_and_norms(), Scope.all_experts(), Scope.block_scales())
    }
    assert set(grown.values()) == {32}
    everything = Scope.everything()
    assert everything.parameters(wide) - everything.parameters(layer) == 256 + 32 + 256 + 256 * 96
    assert everything.parameters(wide) == wide.parameters - 32
    trained = [tensor.role for tensor in wide.shared_tensors if everything.trains(tensor)]
    assert Role.SHARED_DOWN in trained and Role.SELECTION_BIAS not in trained
    assert {tensor.role for tensor in scaled_matrices(wide)} == {
        tensor.role for tensor in layer.tensors if tensor.kind is Kind.MATRIX
    }
