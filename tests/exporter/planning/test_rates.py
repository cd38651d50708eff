"""Rates that fall as the student comes closer to its teacher."""

from __future__ import annotations

import pytest

from exporter.planning.rates import rates_for, trial_blocks, trial_share


def test_rates_of_norms_and_scales_are_interpolated() -> None:
    for scope in ("norms", "scales"):
        assert rates_for(scope, 0.001, 2048) == rates_for(scope, 0.01, 256) == [pytest.approx(3e-4)]
        assert rates_for(scope, 0.03, 256) == rates_for(scope, 3.0, 256) == [pytest.approx(1e-3)]
        (between,) = rates_for(scope, (0.01 * 0.03) ** 0.5, 256)
        assert between == pytest.approx((3e-4 * 1e-3) ** 0.5)


def test_rates_of_matrices_fall_with_the_hidden_size_and_the_better_start() -> None:
    narrow, pruned = rates_for("all", 0.088, 256), rates_for("all", 2.0, 256)
    assert narrow == pytest.approx([1.5e-4, 0.75e-4])
    assert pruned == pytest.approx([1e-3, 5e-4])
    assert rates_for("all", 0.088, 2048) == pytest.approx([rate / 8 for rate in narrow])


@pytest.mark.parametrize(
    ("n_blocks", "per_step", "expected"), [(320, 2, 40), (320, 8, 40), (300, 8, 32), (200, 8, 0), (16, 2, 0), (1, 1, 0)]
)
def test_trials_take_whole_steps(n_blocks: int, per_step: int, expected: int) -> None:
    assert trial_blocks(n_blocks, per_step) == expected


def test_a_single_rate_needs_no_trial() -> None:
    assert trial_share("scales") == 0
    assert trial_share("all") == 2 / 8
