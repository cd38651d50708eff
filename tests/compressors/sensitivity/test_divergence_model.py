"""The model that turns second-order divergence into measured divergence."""

from __future__ import annotations

import math

import pytest

from compressors.model.description.roles import Role
from compressors.sensitivity import DivergenceModel, SecondOrder, feedback_factor


def _order(total: float, routed: float = 0.4) -> SecondOrder:
    return SecondOrder(total, routed * total)


@pytest.mark.parametrize(("smooth", "flips"), [(0.7, 0.045), (1.3, 0.06), (2.0, 0.001)])
def test_two_recipes_give_the_model_back(smooth: float, flips: float) -> None:
    true = DivergenceModel(smooth, flips)
    fitted = DivergenceModel.fitted([(order, true.divergence(order)) for order in (_order(0.0002), _order(0.03, 0.3))])
    assert fitted.smooth == pytest.approx(smooth, rel=2e-2)
    for order in (_order(0.0001), _order(0.001, 1), _order(0.02, 0.1), _order(0.1)):
        assert fitted.divergence(order) == pytest.approx(true.divergence(order), rel=1e-2)


def test_the_price_of_flips_is_the_slope() -> None:
    model, order, step = DivergenceModel(1.1, 0.07), _order(0.01), 1e-7
    more = SecondOrder(order.total, order.routed + step)
    slope = (model.divergence(more) - model.divergence(order)) / step
    assert model.price_of_flips(order) == pytest.approx(slope, rel=1e-4)
    assert model.price_of_flips(SecondOrder(0.01, 0.0)) == 0


def test_both_terms_stay_positive_whatever_was_measured() -> None:
    for points in ([(_order(0.001), 0.001), (_order(0.01), 0.1)], [(_order(0.001), 0.01), (_order(0.01), 0.011)]):
        fitted = DivergenceModel.fitted(points)
        assert fitted.smooth > 0
        assert fitted.flips > 0
        errors = [math.log(fitted.divergence(order) / measured) for order, measured in points]
        assert sum(errors) == pytest.approx(0, abs=1e-6)


def test_one_recipe_keeps_the_proportion_of_the_terms() -> None:
    default = DivergenceModel()
    fitted = DivergenceModel.fitted([(_order(0.01), 2 * default.divergence(_order(0.01)))])
    assert fitted.smooth == pytest.approx(2 * default.smooth)
    assert fitted.flips == pytest.approx(2 * default.flips)


def test_nothing_to_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="give positive numbers"):
        DivergenceModel.fitted([])
    with pytest.raises(ValueError, match="give positive numbers"):
        DivergenceModel.fitted([(_order(0.0), 0.1)])


def test_feedback_leaves_part_of_the_error_where_there_is_feedback() -> None:
    for role in (Role.EXPERT_DOWN, Role.EXPERT_GATE, Role.QUERY, Role.ATTENTION_OUTPUT, Role.TOKEN_EMBEDDING):
        assert 0.2 < feedback_factor(role, "Q3_K") < 1
        assert feedback_factor(role, "BF16") == feedback_factor(role, "IQ1_M") == 1
    assert feedback_factor(Role.ROUTER, "Q4_K") == 1
    assert feedback_factor(Role.EXPERT_UP, "a type of tomorrow") == 0.32
