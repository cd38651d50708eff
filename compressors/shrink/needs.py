"""The evidence that a method needs about a layer's tokens, which says what a run has to gather."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Needs"]


class Needs(IntEnum):
    """The evidence that a method needs; each includes those before."""

    STATISTICS = 1  # it only chooses, so weights may lie on the meta device
    WEIGHTS = 2
    INPUTS = 3  # the evidence has ``inputs_TD``
