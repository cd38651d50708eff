"""Quantized rows of weights in the block formats of llama.cpp and ONNX Runtime."""

from __future__ import annotations

from compressors.model.files.gguf.ggml import dequantize_rows, row_bytes
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.quantize.blocks import search_blocks
from compressors.quantize.kernels import QUANTIZABLE_TYPES, fallback_type, quantize_rows

__all__ = [
    "QUANTIZABLE_TYPES",
    "GGMLQuantizationType",
    "dequantize_rows",
    "fallback_type",
    "quantize_rows",
    "row_bytes",
    "search_blocks",
]
