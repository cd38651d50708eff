"""Blocks of integer codes with float32 scales, against brute force over scales and by the error of the outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressors.model.errors import InputError
from compressors.quantize.feedback import Feedback, IntegerBlocks, quantize_blocks_with_feedback
from compressors.quantize.feedback.scale_search import search_ranges, search_scales


def _matrix(n_rows: int, n_columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_columns, n_columns, generator=generator) / n_columns**0.5 + torch.eye(n_columns)
    inputs = torch.randn(3 * n_columns, n_columns, generator=generator) @ mixing
    inputs *= torch.rand(n_columns, generator=generator) + 0.2
    weights = torch.randn(n_rows, n_columns, generator=generator) * 0.05
    return weights, inputs.T @ inputs / len(inputs)


def _error(weights: torch.Tensor, blocks: IntegerBlocks, moments: torch.Tensor) -> float:
    difference = torch.from_numpy(blocks.values()).double() - weights.double()
    return float((difference @ moments.double() * difference).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])  # at 8 bits the best of 3,000 scales is a matter of luck
@pytest.mark.parametrize("block_size", [16, 64])
def test_searched_scales_are_close_to_the_best_of_all(bits: int, block_size: int) -> None:
    random = np.random.default_rng(bits)
    values = random.standard_normal((6, block_size)).astype(np.float32)
    weights = random.gamma(1, size=block_size).astype(np.float32)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def cost(row: np.ndarray, scale: float) -> float:
        rounded = np.clip(np.rint(row / scale), lowest, highest) * scale
        return float((weights * (rounded - row) ** 2).sum())

    found = search_scales(values, torch.from_numpy(weights), block_size, lowest, highest)
    assert found.shape == (6, 1)
    for row, scale in zip(values, found[:, 0], strict=True):
        largest = np.abs(row).max() / highest
        tried = np.concatenate([sign * np.linspace(0.2, 1.3, 1500) * largest for sign in (-1, 1)])
        best = min(cost(row, scale) for scale in tried)
        assert cost(row, scale) <= 1.15 * best, (cost(row, scale), best)


def test_searched_ranges_are_close_to_the_best_of_all() -> None:
    random = np.random.default_rng(5)
    values = (random.standard_normal((6, 32)) + 0.5).astype(np.float32)
    scales, zero_points = search_ranges(values, None, 32, 15)
    for row, scale, zero in zip(values, scales[:, 0], zero_points[:, 0].astype(int), strict=True):

        def cost(row: np.ndarray, scale: float, zero: int) -> float:
            return float(((np.clip(np.rint(row / scale), -zero, 15 - zero) * scale - row) ** 2).sum())

        span = np.ptp(row) / 15
        best = min(cost(row, tried, z) for tried in np.linspace(0.5, 1.2, 200) * span for z in range(16))
        assert cost(row, scale, zero) <= 1.2 * best


@pytest.mark.parametrize("with_zero_points", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_of_the_outputs_is_well_below_that_of_nearest_codes(bits: int, with_zero_points: bool) -> None:
    weights, moments = _matrix(8, 128, seed=1)
    importance = moments.diagonal()

    def quantize(feedback: Feedback | None) -> IntegerBlocks:
        return quantize_blocks_with_feedback(weights, bits, 32, feedback, importance, with_zero_points=with_zero_points)

    nearest, chosen = quantize(None), quantize(Feedback.of(moments))
    assert _error(weights, chosen, moments) < 0.7 * _error(weights, nearest, moments)
    assert chosen.codes_RN.shape == (8, 128) and chosen.codes_RN.max() < 2**bits
    assert chosen.scales_RK.shape == (8, 4) and chosen.scales_RK.dtype == np.float32
    assert (chosen.zero_points_RK is not None) == with_zero_points


def test_nearest_codes_are_the_nearest() -> None:
    weights, _ = _matrix(4, 64, seed=2)
    blocks = quantize_blocks_with_feedback(weights.bfloat16(), 4, 16, None, None)
    steps = np.arange(-8, 8)[:, None, None] * np.repeat(blocks.scales_RK, 16, axis=1)
    distance = np.abs(steps - weights.bfloat16().float().numpy()).min(axis=0)
    np.testing.assert_allclose(np.abs(blocks.values() - weights.bfloat16().float().numpy()), distance, atol=1e-7)


def test_rows_of_zeros_stay_zero() -> None:
    _, moments = _matrix(1, 64, seed=3)
    for with_zero_points in (False, True):
        blocks = quantize_blocks_with_feedback(
            torch.zeros(2, 64), 4, 32, Feedback.of(moments), None, with_zero_points=with_zero_points
        )
        assert not blocks.values().any()


def test_infinity_is_refused() -> None:
    with pytest.raises(InputError, match=r"blk\.0"):
        quantize_blocks_with_feedback(torch.full((1, 32), torch.inf), 4, 32, None, None, name="blk.0")
