"""Predicts the measured divergence from second-order ones: KL = a Q + b sqrt(R).

Q is the second-order divergence of all errors, R that of the errors that routers see, which are all but the head's.
The second term comes from tokens whose chosen experts change, a jump that no gradient sees; it dominates where errors
are small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["DivergenceModel", "SecondOrder"]


@dataclass(frozen=True)
class SecondOrder:
    """Second-order divergence in nats."""

    total: float
    routed: float  # the part from errors that routers see

    def __add__(self, other: SecondOrder) -> SecondOrder:
        """The divergence of both errors together, if they are independent."""
        return SecondOrder(self.total + other.total, self.routed + other.routed)

    def __mul__(self, factor: float) -> SecondOrder:
        """The divergence of squared errors that are ``factor`` times as large."""
        return SecondOrder(factor * self.total, factor * self.routed)


@dataclass(frozen=True)
class DivergenceModel:
    """The constants a and b; the defaults are common to the two models that this was developed on."""

    smooth: float = 1.2  # a
    flips: float = 0.08  # b, in square roots of nats

    def divergence(self, order: SecondOrder) -> float:
        """The divergence in nats that errors of a second-order divergence cause."""
        return self.smooth * order.total + self.flips * math.sqrt(order.routed)

    def price_of_flips(self, order: SecondOrder) -> float:
        """The derivative of the second term with respect to R; 0 where routers see no errors."""
        return self.flips / (2 * math.sqrt(order.routed)) if order.routed > 0 else 0.0

    @classmethod
    def fitted(cls, points: Sequence[tuple[SecondOrder, float]]) -> DivergenceModel:
        """Fits the model to measured recipes: least squares of the logarithms, both terms positive.

        Args:
            points: order and measured divergence in nats of each recipe; two that lie far apart are enough. One keeps
                the default's proportion of the terms.

        Raises:
            ValueError: there is no point, or a number is not positive.
        """
        if not points or any(not (order.total > 0 and order.routed > 0 and measured > 0) for order, measured in points):
            raise ValueError(f"cannot fit a divergence to {list(points)}: give positive numbers")
        from scipy.optimize import minimize_scalar  # takes a second, which every process would wait for

        default = cls()
        if len({order for order, _ in points}) == 1:
            return _scaled(points, default.flips / default.smooth)
        lowest, highest = (math.log(default.flips / default.smooth * factor) for factor in (1e-3, 1e3))
        best = minimize_scalar(
            lambda log_proportion: _squared_error(points, _scaled(points, math.exp(log_proportion))),
            bounds=(lowest, highest),
            method="bounded",
            options={"xatol": 1e-6},
        )
        return _scaled(points, math.exp(best.x))


def _scaled(points: Sequence[tuple[SecondOrder, float]], proportion: float) -> DivergenceModel:
    """The best model whose terms have this proportion, b / a."""
    shape = DivergenceModel(1.0, proportion)
    logarithms = [math.log(measured / shape.divergence(order)) for order, measured in points]
    scale = math.exp(math.fsum(logarithms) / len(logarithms))
    return DivergenceModel(scale, scale * proportion)


def _squared_error(points: Sequence[tuple[SecondOrder, float]], model: DivergenceModel) -> float:
    return math.fsum(math.log(measured / model.divergence(order)) ** 2 for order, measured in points)
