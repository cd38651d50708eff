"""ggml blocks as ONNX Runtime reads them: the same numbers, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from compressors.model.onnx_blocks import BLOCK_SIZE, from_q4_0, from_q8_0
from compressors.quantize import GGMLQuantizationType, quantize_rows


def _rows() -> torch.Tensor:
    """Random rows, one of zeros, and one whose largest value is negative (its Q4_0 scale is then positive)."""
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    values[0] = 0
    values[1, 5] = -20
    return values


@pytest.mark.parametrize("with_importance", [False, True])
def test_q4_0_blocks_decode_to_what_ggml_decodes(with_importance: bool) -> None:
    values = _rows()
    importance = torch.linspace(0.1, 9, 96) if with_importance else None
    quantized = quantize_rows(values, GGMLQuantizationType.Q4_0, importance, name="test")
    blocks = from_q4_0(quantized)
    # ONNX Runtime's layout, written out: byte j of a row holds elements 2j (low nibble) and 2j + 1 (high nibble).
    codes = np.empty((64, 96), dtype=np.float32)
    codes[:, 0::2] = blocks.codes & 0x0F
    codes[:, 1::2] = blocks.codes >> 4
    decoded = (codes - 8) * np.repeat(blocks.scales_RN.astype(np.float32), BLOCK_SIZE, axis=1)
    np.testing.assert_array_equal(decoded, gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.Q4_0))
    assert np.abs(decoded - values.numpy()).max() < 2


def test_q8_0_blocks_decode_to_what_ggml_decodes() -> None:
    quantized = quantize_rows(_rows(), GGMLQuantizationType.Q8_0, name="test")
    blocks = from_q8_0(quantized)
    decoded = (blocks.codes.astype(np.float32) - 128) * np.repeat(
        blocks.scales_RN.astype(np.float32), BLOCK_SIZE, axis=1
    )
    np.testing.assert_array_equal(decoded, gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.Q8_0))
