"""Learning rates for a student by its divergence from its teacher: the smaller the divergence, the smaller the rate.

Measured on students of the trained models (docs/recovery.md): too high a rate ruins a student that starts well. A
compensated student of half the width at 0.09 nats lost with 1e-3 and gained with 1.5e-4; norms and block scales gained
most with 1e-3 above 0.03 nats and with 3e-4 below 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from compressors.recover.schedule import RATES_HIDDEN_SIZE

__all__ = ["rates_for", "trial_blocks", "trial_share"]

_ANCHORS: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "norms": ((0.01, 3e-4), (0.03, 1e-3)),
    "scales": ((0.01, 3e-4), (0.03, 1e-3)),
    "all": ((0.088, 1.5e-4), (2.0, 1e-3)),
}
"""Two points (divergence in nats, rate); rates are interpolated in logarithms between them, and constant outside."""

_TRIED: Mapping[str, tuple[float, ...]] = {"norms": (1.0,), "scales": (1.0,), "all": (1.0, 0.5)}
"""Multiples of the rate, each tried on a few blocks; the selection split decides."""

_TRIAL_SHARE = 8  # a trial takes one in this many of a rung's blocks
_LEAST_STEPS = 4


def rates_for(scope: str, divergence: float, hidden_size: int) -> Sequence[float]:
    """The rates to try, one or more.

    Args:
        scope: ``norms``, ``scales`` or ``all``.
        divergence: the student's divergence from its teacher, in nats, before training.
        hidden_size: the model's hidden size. An Adam step moves each of a matrix's weights by about the rate, and a
            product in proportion to the hidden size; for norms and scales the rate is a relative change.
    """
    (low, low_rate), (high, high_rate) = _ANCHORS[scope]
    place = math.log(min(max(divergence, low), high) / low) / math.log(high / low)
    rate = low_rate * (high_rate / low_rate) ** place
    if scope == "all":
        rate *= RATES_HIDDEN_SIZE / hidden_size
    return [rate * multiple for multiple in _TRIED[scope]]


def trial_share(scope: str) -> float:
    """The blocks of all trials of a scope's rates, as a share of the rung's own blocks."""
    return len(_TRIED[scope]) / _TRIAL_SHARE if len(_TRIED[scope]) > 1 else 0.0


def trial_blocks(n_blocks: int, blocks_per_step: int) -> int:
    """The number of a rung's blocks that each trial takes, in whole steps; 0 if these are too few to compare rates."""
    steps = n_blocks // _TRIAL_SHARE // blocks_per_step
    return steps * blocks_per_step if steps >= _LEAST_STEPS else 0
