"""The caches of attention in our ONNX graphs, which ONNX Runtime's operator GroupQueryAttention keeps.

The operator has a cache of keys and one of values, which it writes in place where a client gives it room for a whole
text, and else as longer ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from compressors.model.description.mixers import GroupedQuery, Latent

__all__ = ["Attention", "CacheHeads", "cache_heads"]

Attention = GroupedQuery | Latent
"""The mixers with such caches."""


@dataclass(frozen=True)
class CacheHeads:
    """The sizes of a layer's two caches.

    Attributes:
        number: heads of each.
        width: values of a head.
    """

    number: int
    width: int


def cache_heads(mixer: Attention) -> CacheHeads:
    """The caches of a mixer: keys and values, or each half of latent attention's vector."""
    if isinstance(mixer, Latent):
        return CacheHeads(1, (mixer.rotary_dim + mixer.rank) // 2)
    return CacheHeads(mixer.n_kv_heads, mixer.head_dim)
