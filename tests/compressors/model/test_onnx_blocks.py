"""Codes as ONNX Runtime packs them; ggml's blocks hold the same numbers, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from compressors.model.files.onnx_blocks import from_q4_0, from_q8_0, pack, unpack
from compressors.quantize import GGMLQuantizationType
from compressors.quantize.kernels import quantize_rows


def _rows() -> torch.Tensor:
    """Random rows, one of zeros, and one whose largest value is negative (its Q4_0 scale is then positive)."""
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    values[0] = 0
    values[1, 5] = -20
    return values


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_packed_from_the_lowest_bits(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (5, 64), dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, 64 * bits // 8)
    for element in range(64):
        byte, place = divmod(element * bits, 8)
        np.testing.assert_array_equal((packed[:, byte] >> place) & (2**bits - 1), codes[:, element])
    np.testing.assert_array_equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("with_importance", [False, True])
def test_q4_0_blocks_decode_to_what_ggml_decodes(with_importance: bool) -> None:
    values = _rows()
    importance = torch.linspace(0.1, 9, 96) if with_importance else None
    quantized = quantize_rows(values, GGMLQuantizationType.Q4_0, importance, name="test")
    blocks = from_q4_0(quantized)
    expected = gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.Q4_0)
    decoded = (blocks.codes_RN.astype(np.float32) - 8) * np.repeat(blocks.scales_RK, 32, axis=1)
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(blocks.values(), expected)
    assert np.abs(decoded - values.numpy()).max() < 2


def test_q8_0_blocks_decode_to_what_ggml_decodes() -> None:
    quantized = quantize_rows(_rows(), GGMLQuantizationType.Q8_0, name="test")
    blocks = from_q8_0(quantized)
    expected = gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.Q8_0)
    decoded = (blocks.codes_RN.astype(np.float32) - 128) * np.repeat(blocks.scales_RK, 32, axis=1)
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(blocks.values(), expected)
