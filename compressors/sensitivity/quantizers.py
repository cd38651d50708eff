"""Functions that quantize rows for a measurement of their error.

Plans only ask which types there are, and none is measured; so the kernels are imported when rows are quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.integer_blocks import BlockType

if TYPE_CHECKING:
    import torch

__all__ = ["Quantizer", "blocks_quantizer", "ggml_quantizer", "searched_q2_0_quantizer"]

Quantizer = Callable[["torch.Tensor", "torch.Tensor | None", str], "torch.Tensor"]
"""(rows [R, N], importance [N] or None, the weights' name) -> the values that a runtime sees, float32 [R, N]."""


def ggml_quantizer(ggml_type: GGMLQuantizationType) -> Quantizer:
    """A quantizer that runs ggml's own kernel for a type."""

    def quantize(values_RN: torch.Tensor, importance_N: torch.Tensor | None, name: str) -> torch.Tensor:
        import torch

        from compressors.model.files.gguf.ggml import dequantize_rows
        from compressors.quantize.kernels import quantize_rows

        stored = quantize_rows(values_RN, ggml_type, importance_N, name=name)
        return torch.from_numpy(dequantize_rows(stored, ggml_type, values_RN.shape[1]))

    return quantize


def blocks_quantizer(blocks: BlockType) -> Quantizer:
    """A quantizer that searches the scales of ONNX Runtime's blocks."""

    def quantize(values_RN: torch.Tensor, importance_N: torch.Tensor | None, name: str) -> torch.Tensor:
        import torch

        from compressors.quantize.blocks import search_blocks

        found = search_blocks(values_RN, blocks.bits, blocks.block_size, importance_N, name=name)
        return torch.from_numpy(found.values())

    return quantize


def searched_q2_0_quantizer(values_RN: torch.Tensor, importance_N: torch.Tensor | None, name: str) -> torch.Tensor:
    """The quantizer of Q2_0 with a search for its scales, which ggml's kernel does not make."""
    from compressors.quantize.feedback import searched_q2_0

    return searched_q2_0(values_RN, importance_N, name)
