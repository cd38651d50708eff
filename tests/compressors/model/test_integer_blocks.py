"""Scales of integer blocks: near the best that exist, and independent of the other rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.files.integer_blocks import round_to_codes
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.quantize.blocks import search_blocks

_GRID = np.concatenate([sign * np.geomspace(0.25, 1.2, 600) for sign in (1, -1)])


@pytest.fixture(scope="module")
def expert(family_folder: Path) -> torch.Tensor:
    """Some rows of a trained expert, bfloat16 [24, N]."""
    return Checkpoint(family_folder).expert(Role.EXPERT_GATE, 1, 2)[:24]


def _importance(length: int) -> torch.Tensor:
    return torch.exp(torch.randn(length, generator=torch.Generator().manual_seed(1)))


def _best_errors(values_RKB: npt.NDArray[np.float64], weights_KB: npt.NDArray[np.float64], bits: int) -> float:
    """The least sum of weights times squared error over a fine grid of scales, by definition."""
    lowest = -(2 ** (bits - 1))
    widest_RK = np.abs(values_RKB).max(axis=-1) / -lowest
    best_RK = np.full(widest_RK.shape, np.inf)
    for factor in _GRID / (0.25 if bits == 2 else 1):
        scale_RK1 = (factor * widest_RK)[..., None]
        codes_RKB = np.clip(np.round(values_RKB / scale_RK1), lowest, -lowest - 1)
        best_RK = np.minimum(best_RK, (weights_KB * (values_RKB - scale_RK1 * codes_RKB) ** 2).sum(axis=-1))
    return float(best_RK.sum())


@pytest.mark.parametrize(
    ("bits", "block_size", "margin"), [(2, 128, 1.01), (2, 16, 1.02), (4, 32, 1.02), (4, 128, 1.02), (8, 128, 1.1)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_is_near_that_of_the_best_scales(
    expert: torch.Tensor, bits: int, block_size: int, margin: float, weighted: bool
) -> None:
    length = expert.shape[1]
    importance = _importance(length) if weighted else None
    blocks = search_blocks(expert, bits, block_size, importance, name="test")
    weights_N = np.ones(length) if importance is None else importance.double().numpy()
    values_RN = expert.double().numpy()
    found = float((weights_N * (blocks.values() - values_RN) ** 2).sum())
    best = _best_errors(values_RN.reshape(len(expert), -1, block_size), weights_N.reshape(-1, block_size), bits)
    assert found <= margin * best


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_row_does_not_depend_on_its_neighbours(expert: torch.Tensor, bits: int) -> None:
    importance = _importance(expert.shape[1])
    together = search_blocks(expert, bits, 64, importance, name="test")
    alone = search_blocks(expert[7:8], bits, 64, importance, name="test")
    np.testing.assert_array_equal(together.codes_RN[7:8], alone.codes_RN)
    np.testing.assert_array_equal(together.scales_RK[7:8], alone.scales_RK)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_on_the_grid_are_kept(bits: int) -> None:
    """Rows whose values are codes times a scale that float16 holds, of either sign; and a row of zeros."""
    generator = torch.Generator().manual_seed(0)
    lowest = -(2 ** (bits - 1))
    codes = torch.randint(lowest, -lowest, (4, 64), generator=generator).float()
    codes[:, 0::32] = lowest
    values = codes * torch.tensor([[0.125], [-0.25], [3.0], [0.0]])
    blocks = search_blocks(values, bits, 32, None, name="test")
    np.testing.assert_array_equal(blocks.values(), values.numpy())


def test_codes_are_the_nearest_under_the_scales(expert: torch.Tensor) -> None:
    blocks = search_blocks(expert, 4, 32, _importance(expert.shape[1]), name="test")
    values = expert.float().numpy()
    np.testing.assert_array_equal(blocks.codes_RN, round_to_codes(values, blocks.scales_RK, 4))
    error = np.abs(blocks.values() - values)
    for step in (-1, 1):
        codes = np.clip(blocks.codes_RN.astype(int) + step, 0, 15)
        other = (codes - 8) * np.repeat(blocks.scales_RK, 32, axis=1)
        assert (error <= np.abs(other - values) * (1 + 1e-5)).all()
    np.testing.assert_array_equal(blocks.scales_RK, blocks.scales_RK.astype(np.float16))


def test_weights_and_importance_that_are_not_finite_are_refused() -> None:
    values = torch.ones(2, 32)
    with pytest.raises(InputError, match=r"gate: value \[1, 3\] is nan"):
        search_blocks(values.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(torch.nan)), 4, 32, name="gate")
    with pytest.raises(InputError, match="gate: its importance"):
        search_blocks(values, 4, 32, -torch.ones(32), name="gate")
    nothing = search_blocks(values, 4, 32, torch.zeros(32), name="gate")
    np.testing.assert_allclose(nothing.values(), values.numpy(), rtol=2**-11)
