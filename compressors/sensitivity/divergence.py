"""From the predicted second-order divergence Q to the measured one: KL = a Q + b sqrt(Q).

The second term are tokens whose chosen experts change, a jump that no gradient sees; it is most of the divergence where
errors are small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.optimize import minimize_scalar

__all__ = ["DivergenceModel"]


@dataclass(frozen=True)
class DivergenceModel:
    """The defaults are what the two models that this was developed on have in common."""

    smooth: float = 0.78  # a
    flips: float = 0.045  # b, in square roots of nats

    def divergence(self, second_order: float) -> float:
        """The divergence in nats that a second-order divergence in nats stands for."""
        return self.smooth * second_order + self.flips * math.sqrt(second_order)

    def second_order(self, divergence: float) -> float:
        """The inverse of :meth:`divergence`."""
        root = (math.sqrt(self.flips**2 + 4 * self.smooth * divergence) - self.flips) / (2 * self.smooth)
        return root**2

    @classmethod
    def fitted(cls, points: Sequence[tuple[float, float]]) -> DivergenceModel:
        """The model that fits measured recipes best: least squares of the logarithms, both terms positive.

        Args:
            points: (second order, measured divergence) of each recipe, nats; two that lie far apart are enough. One
                keeps the default's proportion of the terms.

        Raises:
            ValueError: there is none, or a number is not positive.
        """
        if not points or any(not (order > 0 and measured > 0) for order, measured in points):
            raise ValueError(f"cannot fit a divergence to {list(points)}: give positive numbers")
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


def _scaled(points: Sequence[tuple[float, float]], proportion: float) -> DivergenceModel:
    """The best model whose terms have this proportion, b / a."""
    shape = DivergenceModel(1.0, proportion)
    logarithms = [math.log(measured / shape.divergence(order)) for order, measured in points]
    scale = math.exp(math.fsum(logarithms) / len(logarithms))
    return DivergenceModel(scale, scale * proportion)


def _squared_error(points: Sequence[tuple[float, float]], model: DivergenceModel) -> float:
    return math.fsum(math.log(measured / model.divergence(order)) ** 2 for order, measured in points)
