"""Routing agreement, worked out by hand, and on a trained model whose router is permuted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from compressors.model.description.roles import Role
from compressors.model.predictions.routing_record import RoutingRecord
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from validate.metrics.bootstrap import mean_interval
from validate.metrics.evaluation import evaluate
from validate.routing.agreement import LayerAgreement, routing_agreement, same_sets
from validate.runtimes.torch import TorchBackend

_Layer = Sequence[tuple[Sequence[int], Sequence[float]]]


def _routing(*layers: _Layer) -> RoutingRecord:
    """Each token as (experts, gate weights)."""
    return RoutingRecord(
        np.array([[experts for experts, _ in layer] for layer in layers], np.int32),
        np.array([[weights for _, weights in layer] for layer in layers], np.float32),
    )


def _agreement(reference: _Layer, model: _Layer, experts: ExpertMap | None = None) -> dict[str, float]:
    (layer,) = routing_agreement(_routing(reference), _routing(model), experts).layers
    return asdict(layer)


def test_identical_routing_agrees_completely() -> None:
    tokens: _Layer = [((3, 1), (0.7, 0.3)), ((0, 2), (0.6, 0.4))]
    wanted = {"overlap": 1.0, "exact": 1.0, "top1": 1.0, "weighted": 1.0, "kept_gate_weight": 1.0}
    assert _agreement(tokens, tokens) == pytest.approx(wanted)
    assert _agreement(tokens, tokens, ExpertMap.keeping(4, ((0, 1, 2, 3),))) == pytest.approx(wanted)


def test_layers_that_never_had_experts_say_nothing() -> None:
    """A leading dense layer, then one whose expert 0 was dropped: of the token's two experts the student keeps one."""
    nothing: _Layer = [((-1, -1), (0.0, 0.0)), ((-1, -1), (0.0, 0.0))]
    reference = _routing(nothing, [((0, 1), (0.75, 0.25)), ((1, 2), (0.5, 0.5))])
    student = _routing(nothing, [((0, 1), (0.9, 0.1)), ((1, 0), (0.6, 0.4))])
    experts = ExpertMap(3, (LayerMap(0, ()), LayerMap(1, ((1,), (2,)))))
    found = routing_agreement(reference, student, experts, n_chunks=2)
    first, second = found.layers
    assert first is None and second is not None
    assert (second.overlap, second.exact, second.kept_gate_weight) == (1.0, 1.0, (0.25 + 1.0) / 2)
    assert found.mean("kept_gate_weight") == second.kept_gate_weight
    assert found.figures()["per_layer"][0] is None
    assert routing_agreement(student, student).mean("overlap") == 1.0


def test_disjoint_routing_does_not_agree() -> None:
    reference: _Layer = [((0, 1), (0.7, 0.3))]
    model: _Layer = [((2, 3), (0.7, 0.3))]
    wanted = {"overlap": 0.0, "exact": 0.0, "top1": 0.0, "weighted": 0.0, "kept_gate_weight": 1.0}
    assert _agreement(reference, model) == pytest.approx(wanted)


def test_partly_shared_sets() -> None:
    """Token 1 shares expert 3 (weight 0.2 of 0.2 + 0.8); token 2 shares both, in the other order."""
    reference: _Layer = [((1, 3), (0.8, 0.2)), ((0, 2), (0.6, 0.4))]
    model: _Layer = [((3, 0), (0.9, 0.1)), ((2, 0), (0.5, 0.5))]
    assert _agreement(reference, model) == pytest.approx(
        {"overlap": (0.5 + 1.0) / 2, "exact": 0.5, "top1": 0.0, "weighted": (0.2 + 1.0) / 2, "kept_gate_weight": 1.0}
    )


def test_dropped_experts_leave_the_reference() -> None:
    """Of teacher experts 0 ... 5 the student keeps 4, 1, 2, which it calls 0, 1, 2.

    Token 1: A = {4, 5, 1} -> {0, 1}, B = {0, 2, 1}: all of A is there, and the strongest (4 -> 0) is B's strongest.
    Token 2: A = {3, 2, 4} -> {2, 0}, B = {1, 0, 2}: all there, but the strongest of A that is left (2) is not B's.
    Token 3: A = {1, 2, 0} -> {1, 2}, B = {0, 1, 0}: half there, which has 0.5 of the 0.5 + 0.3 that are left.
    """
    reference: _Layer = [
        ((4, 5, 1), (0.5, 0.3, 0.2)),
        ((3, 2, 4), (0.6, 0.3, 0.1)),
        ((1, 2, 0), (0.5, 0.3, 0.2)),
    ]
    model: _Layer = [
        ((0, 2, 1), (0.4, 0.3, 0.3)),
        ((1, 0, 2), (0.4, 0.3, 0.3)),
        ((0, 1, 0), (0.4, 0.3, 0.3)),
    ]
    assert _agreement(reference, model, ExpertMap.keeping(6, ((4, 1, 2),))) == pytest.approx(
        {
            "overlap": (1 + 1 + 1 / 2) / 3,
            "exact": 2 / 3,
            "top1": 1 / 3,
            "weighted": (1 + 1 + 0.5 / 0.8) / 3,
            "kept_gate_weight": (0.7 + 0.4 + 0.8) / 3,
        }
    )


def test_tokens_that_lost_every_expert_say_nothing_but_count_as_lost_weight() -> None:
    reference: _Layer = [((2, 3), (0.7, 0.3)), ((0, 3), (0.9, 0.1))]
    model: _Layer = [((1, 0), (0.5, 0.5)), ((0, 1), (0.5, 0.5))]
    assert _agreement(reference, model, ExpertMap.keeping(4, ((0, 1),))) == pytest.approx(
        {"overlap": 1.0, "exact": 1.0, "top1": 1.0, "weighted": 1.0, "kept_gate_weight": (0.0 + 0.9) / 2}
    )


def test_a_layer_that_lost_all_its_tokens_agrees_on_nothing() -> None:
    reference: _Layer = [((2, 3), (0.7, 0.3))]
    model: _Layer = [((0, 1), (0.5, 0.5))]
    assert _agreement(reference, model, ExpertMap.keeping(4, ((0, 1),))) == asdict(
        LayerAgreement(0.0, 0.0, 0.0, 0.0, 0.0)
    )


def test_gate_weights_that_are_not_normalised() -> None:
    """Models without norm_topk_prob apply weights that sum to less than 1; shares do not change."""
    reference: _Layer = [((1, 3), (0.08, 0.02))]
    model: _Layer = [((1, 0), (0.05, 0.01))]
    agreement = _agreement(reference, model, ExpertMap.keeping(4, ((0, 1),)))
    assert agreement["weighted"] == pytest.approx(1.0)
    assert agreement["kept_gate_weight"] == pytest.approx(0.8)


_MERGED = ExpertMap(5, (LayerMap(0, ((0, 1), (2, 3))),))
"""Teacher experts 0 and 1 became the student's 0; 2 and 3 its 1; 4 was dropped."""


def test_merged_experts_become_one_and_add_their_weights() -> None:
    """A = {2, 0, 1} -> {1, 0}: 0 and 1 have 0.6 together and are now the strongest, ahead of 2 with 0.4.

    B of token 1 is {0, 1}: complete, and the strongest agrees. B of token 2 is {1, 1}: half, with 0.4 of the weight.
    Token 3, A = {4, 0, 1} -> {0}, B = {0, 1}: one expert out of one, though two of three slots are left.
    """
    reference: _Layer = [((2, 0, 1), (0.4, 0.3, 0.3)), ((2, 0, 1), (0.4, 0.3, 0.3)), ((4, 0, 1), (0.5, 0.25, 0.25))]
    model: _Layer = [((0, 1), (0.6, 0.4)), ((1, 1), (0.6, 0.4)), ((0, 1), (0.6, 0.4))]
    assert _agreement(reference, model, _MERGED) == pytest.approx(
        {
            "overlap": (1 + 1 / 2 + 1) / 3,
            "exact": 2 / 3,
            "top1": 2 / 3,
            "weighted": (1 + 0.4 + 1) / 3,
            "kept_gate_weight": (1 + 1 + 0.5) / 3,
        }
    )


def test_layers_are_compared_with_those_they_come_from() -> None:
    reference = _routing([((0, 1), (0.6, 0.4))], [((2, 3), (0.6, 0.4))], [((1, 2), (0.6, 0.4))])
    model = _routing([((1, 2), (0.6, 0.4))], [((-1, -1), (0.0, 0.0))])
    experts = ExpertMap(4, (LayerMap(2, ((0,), (1,), (2,))), LayerMap(1, ())))
    agreement = routing_agreement(reference, model, experts)
    assert agreement.layers[1] is None, "without experts there is nothing to agree on"
    assert agreement.layers[0] is not None and agreement.layers[0].exact == 1.0
    assert agreement.mean("overlap") == 1.0, "the mean is over the layers that have experts"


def test_layers_with_a_smaller_top_k_are_padded_with_no_expert() -> None:
    """One of two experts is right; a place that holds none agrees with nothing, not even with another such place."""
    reference: _Layer = [((3, 1, -1), (0.7, 0.3, 0.0)), ((2, -1, -1), (1.0, 0.0, 0.0))]
    model: _Layer = [((3, 0, -1), (0.7, 0.3, 0.0)), ((0, -1, -1), (1.0, 0.0, 0.0))]
    assert _agreement(reference, model) == pytest.approx(
        {"overlap": 0.25, "exact": 0.0, "top1": 0.5, "weighted": 0.35, "kept_gate_weight": 1.0}
    )
    assert _agreement(reference, reference) == pytest.approx(
        {"overlap": 1.0, "exact": 1.0, "top1": 1.0, "weighted": 1.0, "kept_gate_weight": 1.0}
    )


def test_layers_are_judged_one_by_one_with_their_own_map() -> None:
    reference = _routing([((0, 1), (0.6, 0.4))], [((0, 1), (0.6, 0.4))])
    model = _routing([((0, 1), (0.6, 0.4))], [((0, 1), (0.6, 0.4))])
    agreement = routing_agreement(reference, model, ExpertMap.keeping(4, ((0, 1), (2, 1))))
    assert [layer.overlap for layer in agreement.layers] == [1.0, 1.0]  # in layer 1 A is {1}, which B has
    assert [layer.top1 for layer in agreement.layers] == [1.0, 0.0]
    assert agreement.mean("top1") == 0.5
    assert agreement.mean("kept_gate_weight") == pytest.approx((1.0 + 0.4) / 2)


def test_same_sets_in_any_order() -> None:
    first = _routing(
        [((0, 1), (0.6, 0.4)), ((0, 1), (0.6, 0.4)), ((2, 3), (0.5, 0.5))],
        [((2, 3), (0.6, 0.4)), ((2, 3), (0.6, 0.4)), ((2, 3), (0.5, 0.5))],
    )
    second = _routing(
        [((1, 0), (0.6, 0.4)), ((0, 1), (0.6, 0.4)), ((2, 3), (0.5, 0.5))],
        [((2, 3), (0.6, 0.4)), ((2, 1), (0.6, 0.4)), ((3, 2), (0.5, 0.5))],
    )
    assert same_sets(first, second).tolist() == [[True, True, True], [True, False, True]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Source:
    return open_source(toy_checkpoint(tmp_path_factory.mktemp("routing"), n_layers=2))


def _run(student: Student, tokens_BT: npt.NDArray[np.int64]) -> RoutingRecord:
    return evaluate(TorchBackend(student), tokens_BT, {}).routing


def test_a_permuted_router_is_caught(source: Source, heldout_tokens: npt.NDArray[np.int64]) -> None:
    """Router rows in another order than the experts: the export bug that this measure exists for."""
    tokens_BT = heldout_tokens[:256].reshape(2, 128)
    teacher = Student.teacher(source)
    name = "model.layers.1.mlp.gate.weight"
    permuted = teacher.with_overlay({name: source.tensor(Role.ROUTER, 1).roll(1, dims=0)})
    reference = _run(teacher, tokens_BT)
    agreement = routing_agreement(reference, _run(permuted, tokens_BT))
    assert agreement.layers[0].exact == 1.0
    assert agreement.layers[1].overlap < 0.4
    assert agreement.layers[1].top1 < 0.2
    assert routing_agreement(reference, _run(teacher, tokens_BT)).mean("exact") == 1.0


def test_a_pruned_first_layer_routes_as_the_teacher_among_the_survivors(
    source: Source, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    """Layer 0 sees the teacher's inputs: whoever of A is left is in B, and the order by gate weight stays."""
    tokens_BT = heldout_tokens[:256].reshape(2, 128)
    experts = ExpertMap.keeping(32, (tuple(range(0, 32, 2)), tuple(range(16))))
    reference = _run(Student.teacher(source), tokens_BT)
    agreement = routing_agreement(reference, _run(Student(source, experts), tokens_BT), experts)
    first = agreement.layers[0]
    assert first.overlap == first.exact == first.weighted == 1.0
    assert first.top1 > 0.99
    even = (reference.experts_LTK[0] % 2 == 0) * reference.weights_LTK[0]
    assert first.kept_gate_weight == pytest.approx(float((even.sum(1) / reference.weights_LTK[0].sum(1)).mean()))
    assert agreement.layers[1].overlap < 1.0, "layer 1 sees other inputs"


def test_interval_of_the_overlap_is_that_of_its_chunks() -> None:
    """Twelve chunks of ten tokens, two layers; whole chunks agree or do not, so the interval is wide."""
    generator = np.random.default_rng(8)
    good = np.repeat(generator.random((2, 12)) < 0.7, 10, axis=1)
    reference = RoutingRecord(np.zeros((2, 120, 1), np.int32), np.ones((2, 120, 1), np.float32))
    model = RoutingRecord(np.where(good, 0, 1).astype(np.int32)[..., None], reference.weights_LTK)
    found = routing_agreement(reference, model, n_chunks=12)
    assert found.mean("overlap") == pytest.approx(good.mean())
    assert found.overlap_interval == pytest.approx(mean_interval(good.mean(0), 12))
    alone = routing_agreement(reference, model, n_chunks=120).overlap_interval
    assert alone is not None and found.overlap_interval is not None
    assert np.diff(found.overlap_interval) > 2 * np.diff(alone)
    assert routing_agreement(reference, model).overlap_interval is None


def test_interval_counts_only_tokens_that_say_something() -> None:
    """Expert 1 is dropped: of the second chunk a single token is left, and it weighs as one token."""
    chosen = np.array([0, 0, 0, 0, 1, 1, 1, 0], np.int32).reshape(1, 8, 1)
    reference = RoutingRecord(chosen, np.ones((1, 8, 1), np.float32))
    model = RoutingRecord(np.array([0, 0, 0, 0, 0, 0, 0, 7], np.int32).reshape(1, 8, 1), reference.weights_LTK)
    experts = ExpertMap.keeping(8, ((0, 2, 3, 4, 5, 6, 7),))
    found = routing_agreement(reference, model, experts, n_chunks=2)
    assert found.mean("overlap") == pytest.approx(4 / 5)
    assert found.overlap_interval == pytest.approx((0.0, 1.0)), "each chunk drawn twice"


def test_a_selection_of_tokens_survives_its_file(tmp_path: Path) -> None:
    """numpy gives chosen columns in another memory order, which safetensors would write as it lies."""
    experts = np.arange(2 * 6 * 3, dtype=np.int32).reshape(2, 6, 3)
    chosen = RoutingRecord(experts, experts / np.float32(7))
    chosen = RoutingRecord(chosen.experts_LTK[:, [1, 4]], chosen.weights_LTK[:, [1, 4]])
    assert not chosen.experts_LTK.flags.c_contiguous
    chosen.save(tmp_path / "routing.safetensors")
    found = RoutingRecord.load(tmp_path / "routing.safetensors")
    np.testing.assert_array_equal(found.experts_LTK, experts[:, [1, 4]])
    np.testing.assert_array_equal(found.weights_LTK, chosen.weights_LTK)
