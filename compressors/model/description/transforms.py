"""What llama.cpp's converters do to a tensor's values, each with its inverse.

A transform works on whole rows of a matrix, a few at a time, so that no large tensor is held at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["SAME", "InterleaveRotary", "Same", "Transform"]

Sizes = Mapping[str, int]
"""The sizes of a layer by letter (:mod:`compressors.model.description.spec`)."""


class Transform(Protocol):
    """A change of values, or of their order, between torch and llama.cpp."""

    def rows_together(self, sizes: Sizes) -> int:
        """The number of neighbouring rows that have to be transformed together."""

    def write(self, rows_RN: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Returns the rows as llama.cpp has them; as many as it was given, a multiple of :meth:`rows_together`."""

    def read(self, rows_RN: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Undoes :meth:`write`."""


@dataclass(frozen=True)
class Same:
    """Changes nothing."""

    def rows_together(self, sizes: Sizes) -> int:
        """Any row by itself."""
        return 1

    def write(self, rows_RN: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Returns what it is given."""
        return rows_RN

    def read(self, rows_RN: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Returns what it is given."""
        return rows_RN


SAME = Same()


@dataclass(frozen=True)
class InterleaveRotary:
    """Puts the rows of each head that one rotation mixes, i and i + head_dim / 2, side by side.

    ``LlamaModel.permute`` in llama.cpp's ``conversion/llama.py`` does the same.

    Attributes:
        head: the letter of the head's size.
    """

    head: str = "h"

    def rows_together(self, sizes: Sizes) -> int:
        """The rows of a head."""
        return sizes[self.head]

    def write(self, rows_RN: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Brings the rows from transformers' order into llama.cpp's."""
        return self._exchanged(rows_RN, 2, sizes[self.head] // 2)

    def read(self, rows_RN: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Brings the rows from llama.cpp's order into transformers'."""
        return self._exchanged(rows_RN, sizes[self.head] // 2, 2)

    def _exchanged(self, rows_RN: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
        """Exchanges the two axes into which the rows of a head are counted."""
        exchanged_RN: torch.Tensor = rows_RN.unflatten(0, (-1, outer, inner)).transpose(1, 2).reshape_as(rows_RN)
        return exchanged_RN
