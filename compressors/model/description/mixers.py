"""The kinds of token mixers, which let a position of a text look at earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from compressors.model.description.mixers_without_cache import GatedDelta, Mamba2, NoMixer, Recurrent, ShortConvolution
from compressors.model.description.rope import Rope

__all__ = ["GatedDelta", "GroupedQuery", "Latent", "Mamba2", "Mixer", "NoMixer", "OutputGate", "QkNorm", "Recurrent"]
__all__ += ["ShortConvolution"]


class QkNorm(StrEnum):
    """The values that one RMS norm of the projected queries or keys covers."""

    NONE = "none"
    PER_HEAD = "per head"  # scale [head_dim], shared by all heads
    WHOLE = "whole"  # scale as wide as the projection


class OutputGate(StrEnum):
    """The matrix that makes the gates of attention's output from what attention reads."""

    NONE = "none"
    QUERY = "query"  # the rows of a head's gates follow those of its query
    OWN = "own"


@dataclass(frozen=True)
class GroupedQuery:
    """Attention whose query heads share key-value heads in groups (Ainslie et al., arXiv 2305.13245).

    Attributes:
        n_heads: query heads.
        n_kv_heads: key-value heads; they divide the query heads.
        head_dim: values of a head.
        rope: the rotary embedding of queries and keys; None: they are not turned.
        scale: the factor of the products of queries and keys.
        qk_norm: the norms of queries and keys.
        window: tokens that attention reaches back over, itself included; None: all.
        output_gate: the origin of gates whose sigmoids multiply the output.
        turns_before_norms: the rotary embedding comes before the norms of queries and keys, not after them.
        values_are_keys: values are the keys as they are before norms and turning, so there is no matrix for them.
        norms_values: each head's value goes through an RMS norm without scales.
    """

    kind: ClassVar[str] = "grouped-query attention"

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Rope | None
    scale: float
    qk_norm: QkNorm = QkNorm.NONE
    window: int | None = None
    output_gate: OutputGate = OutputGate.NONE
    turns_before_norms: bool = False
    values_are_keys: bool = False
    norms_values: bool = False

    @property
    def query_has_gates(self) -> bool:
        """True if the matrix of the queries makes gates too."""
        return self.output_gate is OutputGate.QUERY

    @property
    def is_recurrent(self) -> bool:
        """False: it looks back at the tokens themselves."""
        return False

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes by letter: Q values of all queries, K of all keys (and of all values), h of a head; H heads.

        P is Q and the gates of the queries, if there are some.
        """
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {"H": self.n_heads, "h": self.head_dim, "Q": query, "K": key, "P": query * (1 + self.query_has_gates)}

    @property
    def cached_values(self) -> int:
        """Values that are cached for each token: its key and its value."""
        return 2 * self.n_kv_heads * self.head_dim

    @property
    def cached_head(self) -> int:
        """Values that lie together in a cache; the block size of a cache type must divide this."""
        return self.head_dim

    @property
    def description(self) -> str:
        """Its sizes in words."""
        values = ", values from the keys" if self.values_are_keys else ""
        return f"{self.n_heads} heads, {self.n_kv_heads} key-value heads of {self.head_dim}{values}"

    @property
    def state_values(self) -> int:
        """Values that are kept for a text, independent of its length."""
        return 0

    @property
    def width(self) -> int:
        """Values of a token before the output projection."""
        return self.n_heads * self.head_dim


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: keys and values are made from one small vector a token (arXiv 2405.04434).

    Attributes:
        n_heads: heads.
        query_rank: size of the vector that queries are made from; None: they are made from the hidden state.
        rank: size of the vector that keys and values are made from.
        plain_dim: values of a query or key that are not turned.
        rotary_dim: values of a query or key that are turned; all heads share those of the key.
        value_dim: values of a value.
        rope: the rotary embedding.
        scale: the factor of the products of queries and keys.
        inner_epsilon: epsilon of the norms of both vectors.
    """

    kind: ClassVar[str] = "latent attention"

    n_heads: int
    query_rank: int | None
    rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    rope: Rope
    scale: float
    inner_epsilon: float

    @property
    def window(self) -> int | None:
        """None: attention reaches back over all tokens."""
        return None

    @property
    def description(self) -> str:
        """Its sizes in words."""
        ranks = f"{self.rank}" if self.query_rank is None else f"{self.query_rank} and {self.rank}"
        return f"{self.n_heads} heads of {self.key_dim} and {self.value_dim}, made from vectors of {ranks}"

    @property
    def is_recurrent(self) -> bool:
        """False: it looks back at the tokens themselves."""
        return False

    @property
    def key_dim(self) -> int:
        """Values of a query or key."""
        return self.plain_dim + self.rotary_dim

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes by letter: A and C the two ranks, R and U outputs of the keys' matrices, Q all queries, O all values.

        In a head, p is the number of a key's values that are not turned, and v that of a value.
        """
        return {
            "H": self.n_heads,
            "A": self.query_rank or 0,
            "C": self.rank,
            "R": self.rank + self.rotary_dim,
            "U": self.n_heads * (self.plain_dim + self.value_dim),
            "Q": self.n_heads * self.key_dim,
            "O": self.n_heads * self.value_dim,
            "p": self.plain_dim,
            "v": self.value_dim,
        }

    @property
    def cached_values(self) -> int:
        """Values that are cached for each token: the small vector, and the turned part of its key."""
        return self.rank + self.rotary_dim

    @property
    def cached_head(self) -> int:
        """Values that lie together in a cache; the block size of a cache type must divide this."""
        return self.rank + self.rotary_dim

    @property
    def state_values(self) -> int:
        """Values that are kept for a text, independent of its length."""
        return 0

    @property
    def width(self) -> int:
        """Values of a token before the output projection."""
        return self.n_heads * max(self.key_dim, self.value_dim)


Mixer = GroupedQuery | Latent | GatedDelta | Mamba2 | ShortConvolution | NoMixer
"""Any of the mixers above."""
