"""The order of values of gate and up in arrays that hold both: all gates first, or a gate and an up in turn.

Everything that runs or changes layers here has gates first; some families' files, and their modules of transformers,
have them in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["gates_first", "in_turn"]


def gates_first(values: torch.Tensor) -> torch.Tensor:
    """Puts all gates of the last axis, on which gates and ups alternate, before all ups."""
    ordered: torch.Tensor = values.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return ordered


def in_turn(values: torch.Tensor) -> torch.Tensor:
    """Undoes :func:`gates_first`."""
    ordered: torch.Tensor = values.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return ordered
