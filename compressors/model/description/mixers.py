"""The kinds of token mixers: what lets a position of a text look at earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from compressors.model.description.rope import Rope

__all__ = ["GroupedQuery", "Mixer", "QkNorm"]


class QkNorm(StrEnum):
    """The values that one RMS norm of the projected queries or keys covers, before the rotary embedding."""

    NONE = "none"
    PER_HEAD = "per head"  # scale [head_dim], shared by all heads
    WHOLE = "whole"  # scale as wide as the projection


@dataclass(frozen=True)
class GroupedQuery:
    """Attention whose query heads share key-value heads in groups (Ainslie et al., arXiv 2305.13245).

    Attributes:
        n_heads: query heads.
        n_kv_heads: key-value heads; they divide the query heads.
        head_dim: values of a head.
        rope: how queries and keys are turned.
        scale: the factor of the products of queries and keys.
        qk_norm: the norms of queries and keys.
        window: tokens that attention reaches back over, itself included; None: all.
    """

    kind: ClassVar[str] = "grouped-query attention"

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Rope
    scale: float
    qk_norm: QkNorm = QkNorm.NONE
    window: int | None = None

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes by letter: Q queries' values, K keys' (and values') values, h those of a head, H heads."""
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {"H": self.n_heads, "h": self.head_dim, "Q": query, "K": key}

    @property
    def cached_values(self) -> int:
        """Values that are cached for each token: its key and its value."""
        return 2 * self.n_kv_heads * self.head_dim

    @property
    def description(self) -> str:
        """Its sizes in words."""
        return f"{self.n_heads} heads, {self.n_kv_heads} key-value heads of {self.head_dim}"


Mixer = GroupedQuery
"""Any of the mixers above."""
