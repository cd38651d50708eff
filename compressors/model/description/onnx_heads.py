"""The heads of ONNX Runtime's operator GroupQueryAttention, by which our graphs compute attention of every kind."""

from __future__ import annotations

from dataclasses import dataclass

from compressors.model.description.mixers import GroupedQuery, Latent

__all__ = ["OperatorHeads", "OperatorMixer", "operator_heads"]

OperatorMixer = GroupedQuery | Latent
"""The mixers that the operator computes."""


@dataclass(frozen=True)
class OperatorHeads:
    """The sizes of the operator, whose caches are a key and a value for each key-value head.

    Attributes:
        n_heads: query heads.
        n_kv_heads: key-value heads.
        head_dim: values of a head.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int

    @property
    def cached_values(self) -> int:
        """Values that are cached for each token."""
        return 2 * self.n_kv_heads * self.head_dim

    @property
    def projected_values(self) -> int:
        """Values of a token's query, key and value."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim


def operator_heads(mixer: OperatorMixer) -> OperatorHeads:
    """The operator's heads for a mixer.

    Latent attention is computed on the small vector itself, to which queries are brought: its only key, and its value,
    are the key's turned part and the vector. The operator caches both, though they are one, because it has no
    other form.
    """
    if isinstance(mixer, Latent):
        return OperatorHeads(mixer.n_heads, 1, mixer.rotary_dim + mixer.rank)
    return OperatorHeads(mixer.n_heads, mixer.n_kv_heads, mixer.head_dim)
