"""Codes with error feedback in the formats that store a code for every value, against definitions and ggml."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compressors.model.errors import InputError
from compressors.quantize import GGMLQuantizationType, dequantize_rows
from compressors.quantize.feedback import Feedback, conditioned, quantize_rows_with_feedback
from compressors.quantize.feedback.fields import Fields, write_codes
from compressors.quantize.feedback.moments import DAMPING
from compressors.quantize.feedback.passes import choose_codes
from compressors.quantize.feedback.scalar import SCALAR_FORMATS, grid_of, levels_of, with_codes
from compressors.quantize.kernels import quantize_rows
from tests.correlated_inputs import weights_and_moments

_TYPES = list(SCALAR_FORMATS)
_IDS = [ggml_type.name for ggml_type in _TYPES]


def _error(
    weights: torch.Tensor, quantized: npt.NDArray[np.uint8], kind: GGMLQuantizationType, moments: torch.Tensor
) -> float:
    difference = torch.from_numpy(dequantize_rows(quantized, kind, weights.shape[1])).double() - weights.double()
    return float((difference @ moments.double() * difference).sum())


def _read_codes(blocks_RKY: npt.NDArray[np.uint8], fields: Sequence[Fields]) -> npt.NDArray[np.uint16]:
    """Reads the codes of all blocks: [R, K, E]."""
    codes_RKE = np.zeros((*blocks_RKY.shape[:2], len(fields[0].byte_E)), dtype=np.uint16)
    for run in fields:
        bits_RKE = blocks_RKY[..., run.byte_E] >> run.shift_E & np.uint8((1 << run.width) - 1)
        codes_RKE |= bits_RKE.astype(np.uint16) << np.uint16(run.low)
    return codes_RKE


@pytest.mark.parametrize("ggml_type", _TYPES, ids=_IDS)
def test_levels_are_those_that_the_formats_define(ggml_type: GGMLQuantizationType) -> None:
    bits = {"Q8_0": 8, "Q6_K": 6, "Q5_K": 5, "Q5_0": 5, "Q5_1": 5, "Q3_K": 3, "Q2_K": 2}.get(ggml_type.name, 4)
    with_minimum = SCALAR_FORMATS[ggml_type].minimum is not None
    levels = levels_of(ggml_type)
    if ggml_type in (GGMLQuantizationType.IQ4_NL, GGMLQuantizationType.IQ4_XS):
        assert levels.nearest is not None
        expected = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
        assert sorted(set(levels.nearest)) == expected
    elif ggml_type is GGMLQuantizationType.MXFP4:
        assert levels.nearest is not None
        assert sorted(set(levels.nearest)) == [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12]
    elif ggml_type is GGMLQuantizationType.Q2_0:
        assert (levels.lowest, levels.highest, levels.nearest) == (-1, 2, None)
    else:
        lowest = 0 if with_minimum else -(2 ** (bits - 1)) + (bits == 8)
        assert (levels.lowest, levels.highest) == (lowest, (2**bits if with_minimum else 2 ** (bits - 1)) - 1)
        assert levels.nearest is None


@pytest.mark.parametrize("ggml_type", _TYPES, ids=_IDS)
def test_every_number_is_rounded_to_the_nearest_level(ggml_type: GGMLQuantizationType) -> None:
    levels = levels_of(ggml_type)
    numbers = np.linspace(levels.lowest - 2, levels.highest + 2, 4001, dtype=np.float32)
    rounded = np.empty_like(numbers)
    levels.round(numbers.copy(), rounded)
    if levels.nearest is None:
        known = np.arange(levels.lowest, levels.highest + 1, dtype=np.float32)
    else:
        known = np.unique(levels.nearest)
    assert set(rounded) == set(known)
    distance = np.abs(numbers[:, None] - known).min(axis=1)
    np.testing.assert_allclose(np.abs(numbers - rounded), distance, atol=1e-6)


@pytest.mark.parametrize("ggml_type", _TYPES, ids=_IDS)
def test_written_codes_are_read_again_and_touch_nothing_else(ggml_type: GGMLQuantizationType) -> None:
    fields = SCALAR_FORMATS[ggml_type].fields
    random = np.random.default_rng(0)
    quantized = quantize_rows(torch.randn(3, 512, generator=torch.Generator().manual_seed(1)), ggml_type, name="noise")
    block_length = len(fields[0].byte_E)
    blocks = quantized.reshape(3, 512 // block_length, -1)
    width = sum(run.width for run in fields)
    codes = random.integers(0, 1 << width, size=(*blocks.shape[:2], block_length), dtype=np.uint16)
    changed = blocks.copy()
    write_codes(changed, fields, codes)
    np.testing.assert_array_equal(_read_codes(changed, fields), codes)
    write_codes(changed, fields, _read_codes(blocks, fields))
    np.testing.assert_array_equal(changed, blocks)
    bits = np.unpackbits(changed ^ blocks)
    assert not bits.any()


@pytest.mark.parametrize("ggml_type", _TYPES, ids=_IDS)
def test_ggml_reads_exactly_the_values_that_were_chosen(ggml_type: GGMLQuantizationType) -> None:
    weights, moments = weights_and_moments(6, 512, seed=2)
    feedback = Feedback.of(moments)
    order = feedback.order_N(1)
    quantized = quantize_rows(weights, ggml_type, moments.diagonal(), name="noise")
    grid = grid_of(quantized, ggml_type, order)
    ordered = weights.T[order].contiguous()
    errors = choose_codes(ordered, grid, feedback, 2)
    codes = np.empty(ordered.shape, dtype=np.uint8)
    codes[order.numpy()] = grid.codes_NR()
    read = dequantize_rows(with_codes(quantized, ggml_type, codes.T), ggml_type, 512)
    np.testing.assert_allclose(read.T[order.numpy()], (ordered - errors).numpy(), rtol=0, atol=2e-8)


@pytest.mark.parametrize("ggml_type", _TYPES, ids=_IDS)
def test_error_of_the_outputs_is_well_below_the_kernels(ggml_type: GGMLQuantizationType) -> None:
    weights, moments = weights_and_moments(16, 256, seed=3)
    importance = moments.diagonal()
    kernel = quantize_rows(weights, ggml_type, importance, name="noise")
    chosen = quantize_rows_with_feedback(weights, ggml_type, importance, Feedback.of(moments), name="noise")
    assert _error(weights, chosen, ggml_type, moments) < 0.75 * _error(weights, kernel, ggml_type, moments)


@pytest.mark.parametrize(
    "ggml_type", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q2_K], ids=lambda kind: kind.name
)
def test_uncoupled_inputs_leave_the_nearest_codes(ggml_type: GGMLQuantizationType) -> None:
    """Without correlation there is nothing to make up for: each value gets the level nearest to it."""
    weights, _ = weights_and_moments(5, 256, seed=4)
    feedback = Feedback.of(torch.zeros(256, 256))
    chosen = quantize_rows_with_feedback(weights, ggml_type, torch.ones(256), feedback, name="noise")
    kernel = quantize_rows(weights, ggml_type, torch.ones(256), name="noise")
    grid = grid_of(kernel, ggml_type, torch.arange(256))
    nearest = [
        grid.round_group(column, weights.T[column : column + 1].contiguous(), torch.ones(1, 1), None)[0].clone()
        for column in range(256)
    ]
    np.testing.assert_allclose(dequantize_rows(chosen, ggml_type, 256).T, torch.stack(nearest), rtol=0, atol=1e-8)


def test_threads_and_dtypes_change_nothing() -> None:
    weights, moments = weights_and_moments(40, 256, seed=5)
    weights = weights.bfloat16()
    results = []
    n_threads = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        feedback = Feedback.of(moments)
        quantize = partial(
            quantize_rows_with_feedback,
            ggml_type=GGMLQuantizationType.Q3_K,
            importance_N=moments.diagonal(),
            feedback=feedback,
            name="noise",
        )
        with ThreadPoolExecutor(2) as pool:
            results += pool.map(quantize, [weights, weights.float()])
        results.append(feedback.propagation(1).weights_NN.numpy())
        assert torch.get_num_threads() == threads
    torch.set_num_threads(n_threads)
    np.testing.assert_array_equal(results[0], results[1])
    for one, other in zip(results[:3], results[3:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_beyond_a_slice_are_quantized_alike() -> None:
    weights, moments = weights_and_moments(1030, 32, seed=5)
    feedback = Feedback.of(moments)
    whole = quantize_rows_with_feedback(weights, GGMLQuantizationType.Q4_0, None, feedback, name="noise")
    rest = quantize_rows_with_feedback(weights[1024:], GGMLQuantizationType.Q4_0, None, feedback, name="noise")
    np.testing.assert_array_equal(whole[1024:], rest)


def test_moments_of_few_tokens_lean_on_the_layers() -> None:
    own, layer = torch.eye(3) * 8 + 2, torch.ones(3, 3)
    torch.testing.assert_close(conditioned(own, 3, layer), (own + layer) / 2)
    torch.testing.assert_close(conditioned(own, 0, layer), layer)
    torch.testing.assert_close(conditioned(own, 9, None), torch.eye(3) * 8.5 + 1.5)


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="calibrate again"):
        Feedback.of(torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("length", [1, 4])
def test_couplings_are_those_of_the_definition(length: int) -> None:
    """A group's target is the best for it if all later columns can be chosen freely (or, in descent, stay)."""
    _, moments = weights_and_moments(1, 16, seed=6)
    feedback = Feedback.of(moments)
    order = feedback.order_N(length)
    energy = moments.diagonal()[order].reshape(-1, length).sum(dim=1)
    assert (energy.diff() <= 0).all()
    assert (order.reshape(-1, length).diff(dim=1) == 1).all()
    moments = moments.double() / moments.diagonal().mean()
    damped = (moments + 0.1 * torch.eye(16))[order][:, order]
    propagation, descent = feedback.propagation(length), feedback.descent(length)
    for start in range(0, 16, length):
        group, later, earlier = slice(start, start + length), slice(start + length, 16), slice(0, start)
        free = torch.linalg.solve(damped[start:, start:], damped[start:, :start])[:length]
        left = damped[group, group]
        if start + length < 16:
            left = left - damped[group, later] @ torch.linalg.solve(damped[later, later], damped[later, group])
        torch.testing.assert_close(propagation.weights_NN[group, earlier].double(), free, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(propagation.metric_GLL[start // length].double(), left, atol=1e-5, rtol=1e-4)
        assert not propagation.weights_NN[group, start:].any()
        fixed = torch.linalg.solve(damped[group, group], damped[group])
        fixed[:, group] = 0
        torch.testing.assert_close(descent.weights_NN[group].double(), fixed, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(descent.metric_GLL[start // length].double(), damped[group, group])


def test_no_other_codes_are_better_by_much() -> None:
    """Two rows of eight columns that matter, every choice of two-bit codes tried."""
    ggml_type = GGMLQuantizationType.Q2_K
    weights, _ = weights_and_moments(2, 256, seed=7)
    mixing = torch.randn(8, 8, generator=torch.Generator().manual_seed(8))
    moments = torch.zeros(256, 256)
    moments[:8, :8] = mixing @ mixing.T
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(256)
    kernel = quantize_rows(weights, ggml_type, torch.ones(256), name="noise")
    chosen = quantize_rows_with_feedback(weights, ggml_type, torch.ones(256), Feedback.of(moments), name="noise")
    fields = SCALAR_FORMATS[ggml_type].fields
    every = np.stack(np.meshgrid(*[np.arange(4)] * 8, indexing="ij"), axis=-1).reshape(-1, 8)
    for row in range(2):
        blocks = np.repeat(kernel[row].reshape(1, 1, -1), len(every), axis=0)
        codes = _read_codes(blocks, fields)
        codes[:, 0, :8] = every
        write_codes(blocks, fields, codes)
        values = torch.from_numpy(dequantize_rows(blocks[:, 0], ggml_type, 256)[:, :8])
        errors = values - weights[row, :8]
        cost = (errors @ damped[:8, :8] * errors).sum(dim=1)
        ours = torch.from_numpy(dequantize_rows(chosen[row : row + 1], ggml_type, 256)[:, :8]) - weights[row, :8]
        ours_cost = float((ours @ damped[:8, :8] * ours).sum())
        assert float(cost.min()) <= ours_cost * (1 + 1e-5)
        assert ours_cost <= float(cost.min()) * 1.3, (ours_cost, float(cost.min()), float(cost.median()))
