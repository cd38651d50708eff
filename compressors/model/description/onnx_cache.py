"""The caches of our ONNX graphs: of attention, and the states of recurrent mixers.

Attention's are kept by ONNX Runtime's operator GroupQueryAttention. It has a cache of keys and one of values, which it
writes in place where a client gives it room for a whole text, and else as longer ones. States have one size for all
texts.
"""

from __future__ import annotations

from dataclasses import dataclass

from compressors.model.description.mixers import GatedDelta, GroupedQuery, Latent, Mamba2, ShortConvolution

__all__ = ["Attention", "CacheHeads", "WithStates", "cache_heads", "state_shapes"]

Attention = GroupedQuery | Latent
"""The mixers with such caches."""

WithStates = GatedDelta | Mamba2 | ShortConvolution
"""The mixers with states."""


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


def state_shapes(mixer: WithStates) -> tuple[tuple[int, ...], ...]:
    """The sizes of the states of a text: the convolution's last inputs by channel, and a matrix for each value head.

    They are those that onnxruntime-genai expects. A short convolution has no other state than its last inputs.
    """
    convolution = (mixer.channels, mixer.kernel - 1)
    if isinstance(mixer, ShortConvolution):
        return (convolution,)
    if isinstance(mixer, Mamba2):
        return convolution, (mixer.n_heads, mixer.key_dim, mixer.head_dim)
    return convolution, (mixer.n_value_heads, mixer.key_dim, mixer.value_dim)
