"""Other scales in quantized blocks, against the values that ggml's own kernels read from the bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressors.model.files.block_scales import block_length, put_scales, rescaled, scales_of
from compressors.model.files.gguf.ggml import dequantize_rows
from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType
from compressors.quantize.kernels import quantize_rows

_T = GGMLQuantizationType
_WITHOUT = {_T.F32, _T.F16, _T.BF16, _T.MXFP4, _T.IQ1_M}  # of those that files are written in
_WITH = [
    ggml_type
    for ggml_type in GGMLQuantizationType
    if ggml_type not in _WITHOUT and ggml_type.name[:2] in ("Q1", "Q2", "Q3", "Q4", "Q5", "Q6", "Q8", "IQ", "TQ")
    if ggml_type not in (_T.Q8_1, _T.Q8_K, _T.Q1_0)
]


@pytest.mark.parametrize("ggml_type", _WITH, ids=lambda ggml_type: ggml_type.name)
def test_values_are_proportional_to_the_scales_and_to_nothing_else(ggml_type: GGMLQuantizationType) -> None:
    generator = torch.Generator().manual_seed(0)
    values_RN = torch.randn(3, 512, generator=generator) + 0.3  # so that minimums are not all zero
    stored = quantize_rows(values_RN, ggml_type, torch.ones(512), name="x")
    before, length = dequantize_rows(stored, ggml_type, 512), block_length(ggml_type)
    assert length == BLOCK_SIZES[ggml_type][0]
    factors_RK = 2.0 ** torch.randint(0, 3, (3, 512 // length), generator=generator)  # no product is rounded
    changed = stored.copy()
    put_scales(changed, ggml_type, rescaled(scales_of(stored, ggml_type), factors_RK))
    expected = before * factors_RK.repeat_interleave(length, dim=1).numpy()
    assert np.array_equal(dequantize_rows(changed, ggml_type, 512), expected)
    put_scales(changed, ggml_type, scales_of(stored, ggml_type))
    assert np.array_equal(changed, stored)


@pytest.mark.parametrize("ggml_type", sorted(_WITHOUT), ids=lambda ggml_type: ggml_type.name)
def test_other_types_have_no_such_scales(ggml_type: GGMLQuantizationType) -> None:
    assert block_length(ggml_type) is None


def test_scales_stay_finite() -> None:
    scales_RKS = torch.tensor([[[6e4, -6e4]], [[1.0, 0.0]]], dtype=torch.float16)
    found = rescaled(scales_RKS, torch.tensor([[2.0], [1.0003]]))
    assert found.dtype == torch.float16
    assert found.tolist() == [[[65504.0, -65504.0]], [[1.0, 0.0]]]
