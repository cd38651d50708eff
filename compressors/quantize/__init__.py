"""Quantized rows of weights in the block formats of llama.cpp and ONNX Runtime.

Here are the types and their sizes, which plans ask for; the modules that quantize import torch.
"""

from __future__ import annotations

from compressors.model.files.gguf.ggml import dequantize_rows, row_bytes
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.quantize.types import QUANTIZABLE_TYPES, fallback_type

__all__ = ["QUANTIZABLE_TYPES", "GGMLQuantizationType", "dequantize_rows", "fallback_type", "row_bytes"]
