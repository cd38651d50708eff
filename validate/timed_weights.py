"""A file's weights, where every tensor that was read counts as progress."""

from __future__ import annotations

import torch

from compressors.model.families import Role
from compressors.model.weights import Place, WrittenWeights
from validate import time_limit

__all__ = ["TimedWeights"]


class TimedWeights:
    """The same weights; implements :class:`~compressors.model.weights.WrittenWeights`.

    A comparison of a large file takes long; what it does between two reads does not.
    """

    def __init__(self, weights: WrittenWeights) -> None:
        self._weights = weights

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`~compressors.model.weights.Weights`, as for all that follows."""
        return self._weights.dtype

    def dtype_of(self, role: Role, layer: int | None) -> torch.dtype:
        """Without a read."""
        return self._weights.dtype_of(role, layer)

    def tensor(self, role: Role, layer: int | None) -> torch.Tensor:
        """Reads a tensor."""
        time_limit.renew()
        return self._weights.tensor(role, layer)

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Reads rows of a tensor."""
        time_limit.renew()
        return self._weights.rows(role, layer, rows)

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Reads an expert's projection."""
        time_limit.renew()
        self._weights.read_expert(role, layer, expert, out)

    def router_place(self, layer: int) -> Place:
        """Without a read."""
        return self._weights.router_place(layer)
