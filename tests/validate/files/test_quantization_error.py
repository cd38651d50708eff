"""Rows of every type, as several quantizers write them, pass; noise, another size and lost rows do not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES

from benchmarks.damage.error_feedback import FEEDBACK_TYPES, fed_back
from compressors.model.files.gguf.ggml import dequantize_rows
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.integer_blocks import BlockType, search_blocks
from compressors.model.sources.weights import StoredType
from validate.files.quantization_error import MatrixError, quantized

_T = GGMLQuantizationType
_FINE = (
    _T.Q8_0,
    _T.Q6_K,
    _T.Q5_K,
    _T.Q5_1,
    _T.Q5_0,
    _T.Q4_K,
    _T.Q4_1,
    _T.Q4_0,
    _T.IQ4_NL,
    _T.IQ4_XS,
    _T.MXFP4,
    _T.Q3_K,
)
_COARSE = (_T.Q2_K, _T.IQ3_S, _T.IQ3_XXS, _T.IQ2_XXS, _T.Q2_0, _T.TQ2_0, _T.TQ1_0)
_FINE_BLOCKS = (BlockType(8, 128), BlockType(8, 16), BlockType(4, 128), BlockType(4, 16))
_COARSE_BLOCKS = (BlockType(2, 128), BlockType(2, 32))
_ROWS, _LENGTH = 40, 256


@pytest.fixture(scope="module")
def original() -> torch.Tensor:
    """Rows of different sizes, two of them with a few large values."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(_ROWS, _LENGTH, generator=generator) * torch.logspace(-2, 0, _ROWS)[:, None]
    values[7, :3] *= 30
    values[30, 100] *= 60
    return values.bfloat16().float()


def _stored(values: torch.Tensor, kind: StoredType, importance: torch.Tensor | None = None) -> torch.Tensor:
    weights = None if importance is None else importance.numpy()
    if isinstance(kind, BlockType):
        return torch.from_numpy(search_blocks(values.numpy(), kind.bits, kind.block_size, weights).values())
    return torch.from_numpy(dequantize_rows(quantized(values, kind, weights), kind, values.shape[1]))


def _compared(original: torch.Tensor, found: torch.Tensor, kind: StoredType) -> MatrixError:
    matrix = MatrixError(kind)
    for start in range(0, len(original), 32):  # in pieces, as an embedding is
        matrix.add(original[start : start + 32], found[start : start + 32])
    return matrix


def _is_whole(matrix: MatrixError) -> bool:
    return not (matrix.damaged or matrix.is_too_far or matrix.is_scaled)


@pytest.mark.parametrize("kind", (*_FINE, *_COARSE, *_FINE_BLOCKS, *_COARSE_BLOCKS), ids=lambda kind: kind.name)
def test_what_a_type_makes_passes_and_damage_does_not(original: torch.Tensor, kind: StoredType) -> None:
    generator = torch.Generator().manual_seed(4)
    importance = torch.exp(1.5 * torch.randn(_LENGTH, generator=generator))
    plain, weighted = _stored(original, kind), _stored(original, kind, importance)
    assert _is_whole(_compared(original, plain, kind))
    assert _is_whole(_compared(original, weighted, kind))
    size = original.square().mean(1, keepdim=True).sqrt()
    noise = 0.5 * size * torch.randn(original.shape, generator=generator)
    if kind not in (_T.IQ2_XXS, _T.Q2_0, _T.TQ1_0, _T.TQ2_0, *_COARSE_BLOCKS):
        # their own error is nearly as large, or larger
        assert _compared(original, _stored(original + noise, kind), kind).is_too_far
    lost = plain.clone()
    lost[[5, 35]] = 0
    assert _compared(original, lost, kind).damaged == [5, 35]
    if kind in (*_FINE, *_FINE_BLOCKS):
        scaled = _compared(original, _stored(1.05 * original, kind), kind)
        assert scaled.is_scaled
        assert scaled.scale == pytest.approx(1.05, abs=0.03)


@pytest.mark.parametrize("kind", (*FEEDBACK_TYPES, *_FINE_BLOCKS, *_COARSE_BLOCKS), ids=lambda kind: kind.name)
def test_codes_chosen_by_error_feedback_pass(original: torch.Tensor, kind: StoredType) -> None:
    found = fed_back(original, kind)
    matrix = _compared(original, found, kind)
    assert _is_whole(matrix), (matrix.relative_error / matrix.usual_error, matrix.scale, matrix.damaged)
    if kind is _T.Q4_K:
        assert matrix.relative_error > 1.1 * matrix.usual_error, "error feedback raises a matrix's own error"


def _casts(values: torch.Tensor) -> Iterator[torch.Tensor]:
    yield values
    yield values.bfloat16().float()
    yield values.half().float()


def test_float_values_must_be_equal_or_rounded_alike() -> None:
    original = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    for cast in _casts(original):
        assert not _compared(original, cast, _T.F32).damaged
    mixed = original.clone()
    mixed[2] = original[2].bfloat16().float()
    assert _compared(original, mixed, _T.BF16).damaged == [2]
    nudged = original.clone()
    nudged[1, 3] = float(np.nextafter(np.float32(original[1, 3]), np.float32(9)))
    assert _compared(original, nudged, _T.F32).damaged == [1]
    lost = original.clone()
    lost[3, 0] = float("nan")
    assert _compared(original, lost, _T.F32).damaged == [3]


def test_an_original_on_the_types_own_grid_may_be_quantized_otherwise() -> None:
    """A checkpoint that was quantized before has no error of its own; another quantizer's is no damage."""
    kind = _T.Q4_0
    values = _stored(torch.randn(32, _LENGTH, generator=torch.Generator().manual_seed(6)), kind)
    weighted = _stored(values, kind, torch.exp(torch.randn(_LENGTH, generator=torch.Generator().manual_seed(7))))
    assert GGML_QUANT_SIZES[kind][0] == 32
    assert _is_whole(_compared(values, weighted, kind))
