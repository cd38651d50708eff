"""Codes with error feedback in the formats of vectors and signs, against gguf-py's tables, brute force and ggml."""

from __future__ import annotations

from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch

from compressors.quantize import GGMLQuantizationType, dequantize_rows
from compressors.quantize.feedback import Feedback, quantize_rows_with_feedback
from compressors.quantize.feedback.codebook import CODEBOOK_FORMATS, grid_of, table_of, with_codes
from compressors.quantize.feedback.passes import choose_codes
from compressors.quantize.kernels import quantize_rows
from tests.correlated_inputs import weights_and_moments

_TYPES = list(CODEBOOK_FORMATS)
_IDS = [ggml_type.name for ggml_type in _TYPES]


@pytest.mark.parametrize("ggml_type", _TYPES, ids=_IDS)
def test_tables_are_those_of_gguf_py(ggml_type: GGMLQuantizationType) -> None:
    theirs = getattr(gguf.quants, ggml_type.name)
    theirs.init_grid()
    expected = theirs.grid.reshape(-1, CODEBOOK_FORMATS[ggml_type].vector_length)
    ours = table_of(ggml_type)
    np.testing.assert_array_equal(ours.entries_TE.numpy() * expected.flat[0], expected)
    assert ours.even_signs == (ggml_type.name not in ("IQ2_S", "IQ3_S"))


@pytest.mark.parametrize("ggml_type", _TYPES, ids=_IDS)
def test_ggml_reads_exactly_the_values_that_were_chosen(ggml_type: GGMLQuantizationType) -> None:
    weights, moments = weights_and_moments(6, 512, seed=1)
    feedback = Feedback.of(moments)
    order = feedback.order_N(8)
    quantized = quantize_rows(weights, ggml_type, moments.diagonal(), name="noise")
    grid = grid_of(quantized, ggml_type, order)
    ordered = weights.T[order].contiguous()
    errors = choose_codes(ordered, grid, feedback, 1)
    groups = order[::8].numpy() // 8
    index = np.empty(grid.index_GVR.shape, dtype=np.uint16)
    signs = np.empty((64, 6), dtype=np.uint8)
    index[groups], signs[groups] = grid.index_GVR.numpy(), grid.signs_GR()
    written = with_codes(quantized, ggml_type, index, signs)
    read = dequantize_rows(written, ggml_type, 512)
    np.testing.assert_allclose(read.T[order.numpy()], (ordered - errors).numpy(), rtol=0, atol=2e-8)
    if CODEBOOK_FORMATS[ggml_type].even_signs:
        assert not (np.bitwise_count(signs) % 2).any()


@pytest.mark.parametrize("ggml_type", _TYPES, ids=_IDS)
def test_nearest_vectors_are_those_of_every_vector_and_sign_tried(ggml_type: GGMLQuantizationType) -> None:
    random = np.random.default_rng(2)
    table = table_of(ggml_type).entries_TE.numpy()
    length = table.shape[1]
    weights, _ = weights_and_moments(20, 256, seed=3)
    quantized = quantize_rows(weights, ggml_type, torch.ones(256), name="noise")
    grid = grid_of(quantized, ggml_type, torch.arange(256))
    scale = np.abs(dequantize_rows(quantized, ggml_type, 256)[:, :8]).max(axis=1) / table.max()
    targets = torch.from_numpy((random.standard_normal((8, 20)) * scale * 2).astype(np.float32))
    metric = torch.diag(torch.from_numpy(random.uniform(0.5, 2, 8).astype(np.float32)))
    chosen = grid.round_group(0, targets, metric, None).numpy()
    patterns = np.array(np.meshgrid(*[[1, -1]] * 8, indexing="ij")).reshape(8, -1).T
    if CODEBOOK_FORMATS[ggml_type].even_signs:
        patterns = patterns[patterns.prod(axis=1) == 1]
    for row in range(20):
        step = grid._scale_SR[0, row].item()
        best = np.inf
        for pattern in patterns:
            total = 0.0
            for first in range(0, 8, length):
                part = slice(first, first + length)
                candidates = table * pattern[part] * step
                costs = ((candidates - targets.numpy()[part, row]) ** 2 * metric.diagonal().numpy()[part]).sum(axis=1)
                total += costs.min()
            best = min(best, total)
        ours = ((chosen[:, row] - targets.numpy()[:, row]) ** 2 * metric.diagonal().numpy()).sum()
        assert best <= ours * (1 + 1e-5)
        assert ours <= best * (1.3 if CODEBOOK_FORMATS[ggml_type].even_signs else 1 + 1e-5)


@pytest.mark.parametrize("ggml_type", _TYPES, ids=_IDS)
def test_error_of_the_outputs_is_well_below_the_kernels(ggml_type: GGMLQuantizationType) -> None:
    weights, moments = weights_and_moments(16, 256, seed=4)

    def error(quantized: np.ndarray) -> float:
        difference = torch.from_numpy(dequantize_rows(quantized, ggml_type, 256)).double() - weights.double()
        return float((difference @ moments.double() * difference).sum())

    kernel = quantize_rows(weights, ggml_type, moments.diagonal(), name="noise")
    chosen = quantize_rows_with_feedback(weights, ggml_type, moments.diagonal(), Feedback.of(moments), name="noise")
    assert error(chosen) < 0.75 * error(kernel)


def test_sweeps_never_make_the_error_larger() -> None:
    weights, moments = weights_and_moments(8, 256, seed=5)
    feedback = Feedback.of(moments)
    order = feedback.order_N(8)
    damped = moments / moments.diagonal().mean() + 0.1 * torch.eye(256)
    damped = damped[order][:, order].double()
    quantized = quantize_rows(weights, GGMLQuantizationType.IQ2_XXS, moments.diagonal(), name="noise")
    costs = []
    for n_sweeps in range(4):
        grid = grid_of(quantized, GGMLQuantizationType.IQ2_XXS, order)
        errors = choose_codes(weights.T[order].contiguous(), grid, feedback, n_sweeps).double()
        costs.append(((damped @ errors) * errors).sum(dim=0))
    for before, after in pairwise(costs):
        assert (after <= before * (1 + 1e-5)).all()
    assert costs[-1].sum() < 0.97 * costs[0].sum()
