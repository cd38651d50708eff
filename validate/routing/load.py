"""The load of experts: the share of the tokens, and of the gate weight, that each expert gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compressors.model.predictions.routing_record import NO_EXPERT, RoutingRecord

__all__ = ["DEAD_SHARE", "LayerLoad", "expert_load", "load_figures"]

DEAD_SHARE = 0.1
"""An expert is dead if it gets less than this part of an even share of the tokens."""

_DIGITS = 4


@dataclass(frozen=True)
class LayerLoad:
    """The load of the experts (E) of one layer."""

    tokens_E: npt.NDArray[np.float64]  # share of the tokens that reach the expert; the sum is the layer's top-k
    gate_weight_E: npt.NDArray[np.float64]  # share of the gate weight; the sum is 1

    @property
    def variation(self) -> float:
        """Coefficient of variation of the tokens: their standard deviation over the experts, divided by their mean."""
        return float(self.tokens_E.std() / self.tokens_E.mean())

    @property
    def dead(self) -> list[int]:
        """Experts that get less than :data:`DEAD_SHARE` of an even share."""
        return np.flatnonzero(self.tokens_E < DEAD_SHARE * self.tokens_E.mean()).tolist()

    @property
    def largest(self) -> float:
        """The load of the busiest expert, in even shares."""
        return float(self.tokens_E.max() / self.tokens_E.mean())


def expert_load(routing: RoutingRecord, n_experts: Sequence[int]) -> list[LayerLoad | None]:
    """The load of every layer, in the numbering of the model that ran; None for a layer without experts.

    Args:
        routing: the routing of any number of tokens.
        n_experts: the number of experts of each layer; 0 if it has none.
    """
    return [
        _layer_load(experts_TK, weights_TK, n_experts[layer]) if n_experts[layer] else None
        for layer, (experts_TK, weights_TK) in enumerate(zip(routing.experts_LTK, routing.weights_LTK, strict=True))
    ]


def load_figures(layers: Sequence[LayerLoad | None]) -> dict[str, object]:
    """The report's figures, as plain data for JSON: shares by layer, with four significant digits."""
    routed = [layer for layer in layers if layer is not None]
    return {
        "tokens": [layer and _rounded(layer.tokens_E) for layer in layers],
        "gate_weight": [layer and _rounded(layer.gate_weight_E) for layer in layers],
        "variation": [layer and _round(layer.variation) for layer in layers],
        "dead": [layer and layer.dead for layer in layers],
        "mean_variation": _round(float(np.mean([layer.variation for layer in routed]))),
        "n_dead": sum(len(layer.dead) for layer in routed),
        "largest": _round(max(layer.largest for layer in routed)),
    }


def _layer_load(experts_TK: npt.NDArray[np.int32], weights_TK: npt.NDArray[np.float32], n_experts: int) -> LayerLoad:
    chosen = experts_TK != NO_EXPERT
    experts, weights = experts_TK[chosen], weights_TK[chosen].astype(np.float64)
    return LayerLoad(
        np.bincount(experts, minlength=n_experts) / len(experts_TK),
        np.bincount(experts, weights, minlength=n_experts) / weights.sum(),
    )


def _rounded(values: npt.NDArray[np.float64]) -> list[float]:
    return [_round(value) for value in values.tolist()]


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
