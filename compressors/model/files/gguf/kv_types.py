"""The types in which llama.cpp can hold cached keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Literal, get_args

from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType

__all__ = ["KV_TYPES", "KvType", "bytes_per_value", "is_quantized", "values_per_block"]

KvType = Literal["f16", "f32", "q8_0", "q4_0"]
"""The values of ``--kv-type``."""

KV_TYPES: Mapping[str, GGMLQuantizationType] = {name: GGMLQuantizationType[name.upper()] for name in get_args(KvType)}
"""ggml's types by these values."""


def bytes_per_value(kv_type: str) -> Fraction:
    """The bytes of one cached value, its share of a block's scale included."""
    n_values, n_bytes = BLOCK_SIZES[KV_TYPES[kv_type]]
    return Fraction(n_bytes, n_values)


def values_per_block(kv_type: str) -> int:
    """The number of values that share a scale; a head consists of whole blocks."""
    return BLOCK_SIZES[KV_TYPES[kv_type]][0]


def is_quantized(kv_type: str) -> bool:
    """True if values share a scale; such caches need flash attention."""
    return values_per_block(kv_type) > 1
