"""ONNX Runtime's blocks with error feedback, against the searched blocks with the nearest codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressors.model.errors import InputError
from compressors.model.files.integer_blocks import IntegerBlocks
from compressors.quantize.blocks import search_blocks
from compressors.quantize.feedback import Feedback, quantize_blocks_with_feedback
from tests.correlated_inputs import weights_and_moments


def _error(weights: torch.Tensor, blocks: IntegerBlocks, moments: torch.Tensor) -> float:
    difference = torch.from_numpy(blocks.values()).double() - weights.double()
    return float((difference @ moments.double() * difference).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block_size", [16, 128])
def test_error_of_the_outputs_is_well_below_that_of_nearest_codes(bits: int, block_size: int) -> None:
    weights, moments = weights_and_moments(8, 128, seed=1)
    importance = moments.diagonal()
    nearest = search_blocks(weights, bits, block_size, importance, name="noise")
    chosen = quantize_blocks_with_feedback(weights, bits, block_size, Feedback.of(moments), importance, name="noise")
    assert _error(weights, chosen, moments) < 0.7 * _error(weights, nearest, moments)
    assert chosen.bits == bits
    assert chosen.codes_RN.shape == (8, 128) and chosen.codes_RN.max() < 2**bits
    assert chosen.scales_RK.shape == (8, 128 // block_size)
    np.testing.assert_array_equal(chosen.scales_RK, chosen.scales_RK.astype(np.float16).astype(np.float32))


def test_fitted_scales_leave_less_error_than_any_near_them() -> None:
    """The last pass chooses codes again after the fit, so the steps tried are no small ones."""
    weights, moments = weights_and_moments(4, 64, seed=2)
    damped = moments + 0.1 * moments.diagonal().mean() * torch.eye(64)
    chosen = quantize_blocks_with_feedback(weights, 2, 32, Feedback.of(moments), None, name="noise")
    reached = _error(weights, chosen, damped)
    for block in range(2):
        for factor in (0.9, 1.1):
            scales = chosen.scales_RK.copy()
            scales[:, block] *= factor
            assert _error(weights, IntegerBlocks(chosen.codes_RN, scales, 2), damped) > reached


def test_rows_of_zeros_stay_zero() -> None:
    _, moments = weights_and_moments(1, 64, seed=3)
    blocks = quantize_blocks_with_feedback(torch.zeros(2, 64), 4, 32, Feedback.of(moments), None, name="zeros")
    assert not blocks.values().any()


def test_storage_dtypes_give_the_same_codes() -> None:
    weights, moments = weights_and_moments(4, 64, seed=4)
    feedback = Feedback.of(moments)
    half = quantize_blocks_with_feedback(weights.bfloat16(), 4, 32, feedback, None, name="noise")
    full = quantize_blocks_with_feedback(weights.bfloat16().float(), 4, 32, feedback, None, name="noise")
    np.testing.assert_array_equal(half.codes_RN, full.codes_RN)
    np.testing.assert_array_equal(half.scales_RK, full.scales_RK)


def test_infinity_is_refused() -> None:
    with pytest.raises(InputError, match=r"blk\.0"):
        quantize_blocks_with_feedback(torch.full((1, 32), torch.inf), 4, 32, Feedback.of(torch.eye(32)), name="blk.0")
