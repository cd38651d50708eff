"""The types of ggml that a matrix can be written in, and those that stand in where blocks do not divide a row."""

from __future__ import annotations

from collections.abc import Mapping

from compressors.model.errors import UnsupportedError
from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType

__all__ = ["QUANTIZABLE_TYPES", "fallback_type"]

_T = GGMLQuantizationType

_FALLBACKS: Mapping[GGMLQuantizationType, GGMLQuantizationType | None] = {
    **dict.fromkeys((_T.F32, _T.F16, _T.BF16)),
    **dict.fromkeys((_T.Q8_0, _T.Q5_1, _T.Q5_0, _T.Q4_1, _T.Q4_0, _T.IQ4_NL, _T.MXFP4)),
    _T.Q6_K: _T.Q8_0,
    _T.Q5_K: _T.Q5_1,
    _T.Q4_K: _T.Q5_0,
    **dict.fromkeys((_T.Q3_K, _T.Q2_K, _T.Q2_0, _T.TQ2_0, _T.TQ1_0), _T.Q4_0),
    **dict.fromkeys((_T.IQ4_XS, _T.IQ3_S, _T.IQ3_XXS), _T.IQ4_NL),
    **dict.fromkeys((_T.IQ2_S, _T.IQ2_XS, _T.IQ2_XXS, _T.IQ1_M, _T.IQ1_S), _T.IQ4_NL),
}
"""Every type that a matrix can be written in, with the type of blocks of 32 that llama.cpp takes when its own blocks do
not divide a row (``tensor_type_fallback`` in ``src/llama-quant.cpp``)."""

QUANTIZABLE_TYPES = frozenset(_FALLBACKS)
"""The types that :func:`compressors.quantize.kernels.quantize_rows` writes."""


def fallback_type(ggml_type: GGMLQuantizationType, row_length: int) -> GGMLQuantizationType:
    """The type that rows of this length get when ``ggml_type`` is asked for: itself, or llama.cpp's stand-in.

    Rows that blocks of 32 do not divide become F16.

    Raises:
        UnsupportedError: the type is not one that a matrix can be written in.
    """
    if ggml_type not in _FALLBACKS:
        supported = ", ".join(known.name for known in _FALLBACKS)
        raise UnsupportedError(f"type {ggml_type.name} is not supported; choose one of {supported}")
    for candidate in (ggml_type, _FALLBACKS[ggml_type]):
        if candidate is not None and row_length % BLOCK_SIZES[candidate][0] == 0:
            return candidate
    return GGMLQuantizationType.F16
