"""Margins by brute force, and ties worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compressors.model.predictions.routing_record import RoutingRecord, selection_margins
from validate.routing.ties import TIE_MARGIN, find_ties


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_margins_are_between_the_last_chosen_and_the_next(top_k: int) -> None:
    logits_TE = np.random.default_rng(top_k).normal(size=(50, 8)).astype(np.float32)
    expected = [sorted(row, reverse=True)[top_k - 1] - sorted(row, reverse=True)[top_k] for row in logits_TE]
    np.testing.assert_array_equal(selection_margins(logits_TE, top_k), np.array(expected, np.float32))
    shifted = selection_margins(logits_TE + 3, top_k)  # a softmax does not see it
    np.testing.assert_allclose(shifted, expected, atol=1e-6)


def test_without_another_expert_the_margin_is_infinite() -> None:
    assert np.isinf(selection_margins(np.zeros((2, 4), np.float32), 4)).all()


def _routing(experts: list[list[list[int]]], margins: list[list[float]] | None) -> RoutingRecord:
    experts_LTK = np.array(experts, np.int32)
    weights_LTK = np.where(experts_LTK < 0, 0, 0.5).astype(np.float32)
    return RoutingRecord(experts_LTK, weights_LTK, None if margins is None else np.array(margins, np.float32))


def test_disagreements_are_split_into_ties_and_others() -> None:
    """Layer 0: tokens 1 and 2 differ, 2 and 3 are ties. Layer 1: tokens 0 and 1 differ, 0 is a tie. Layer 2: none."""
    tie = TIE_MARGIN / 2
    none = [[-1, -1]] * 4
    reference = _routing(
        [[[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 1], [0, 1], [2, 3], [2, 3]], none],
        [[0.5, 0.3, tie, tie], [tie, 0.2, 0.4, 0.5], [np.inf] * 4],
    )
    model = _routing(
        [[[1, 0], [0, 2], [3, 4], [2, 3]], [[4, 5], [1, 4], [3, 2], [2, 3]], none],
        [[0.5, 0.4, tie, tie], [tie, 0.2, 0.4, 0.2], [np.inf] * 4],
    )
    ties = find_ties(reference, model)
    assert ties is not None
    assert ties.threshold == TIE_MARGIN
    assert ties.tokens == 3 / 8
    assert ties.differing == 4 / 8
    assert ties.differing_tied == 2 / 4
    assert ties.overlap_without_ties == pytest.approx(((1 + 0.5) / 2 + (0.5 + 1 + 1) / 3) / 2)
    assert ties.median_margin == pytest.approx(0.25)
    assert ties.median_margin_differing == pytest.approx((tie + 0.2) / 2)
    assert ties.median_margin_change == pytest.approx(0.0)


def test_equal_routings_have_nothing_to_split() -> None:
    reference = _routing([[[0, 1], [2, 3]]], [[0.0, np.inf]])
    ties = find_ties(reference, reference)
    assert ties is not None
    assert (ties.differing, ties.differing_tied, ties.median_margin_differing) == (0.0, None, None)
    assert ties.overlap_without_ties == 1.0
    assert ties.median_margin == 0.0


def test_nothing_is_said_where_margins_are_not_known(tmp_path: Path) -> None:
    unknown = _routing([[[0, 1]]], None)
    known = _routing([[[0, 1]]], [[0.2]])
    assert find_ties(unknown, known) is None
    ties = find_ties(known, unknown)
    assert ties is not None and ties.median_margin_change is None
    for routing in (unknown, known):
        routing.save(tmp_path / "routing.safetensors")
        again = RoutingRecord.load(tmp_path / "routing.safetensors")
        assert (again.margins_LT is None) == (routing.margins_LT is None)
    assert RoutingRecord.concatenate([known, known]).margins_LT is not None
    assert RoutingRecord.concatenate([known, unknown]).margins_LT is None


def test_tokens_picked_out_of_order_survive_the_disk(tmp_path: Path) -> None:
    """Arrays picked with indices lie otherwise in memory than their shape says."""
    generator = np.random.default_rng(3)
    routing = RoutingRecord(
        generator.integers(0, 9, (3, 20, 2)).astype(np.int32),
        generator.random((3, 20, 2), np.float32),
        generator.random((3, 20), np.float32),
    )
    chosen = routing.tokens(np.array([17, 2, 5]))
    np.testing.assert_array_equal(chosen.experts_LTK[:, 1], routing.experts_LTK[:, 2])
    chosen.save(tmp_path / "routing.safetensors")
    for name, array in vars(RoutingRecord.load(tmp_path / "routing.safetensors")).items():
        np.testing.assert_array_equal(array, getattr(chosen, name))
