"""Our quantized bytes against those of llama.cpp's own quantizer, and the way back against gguf-py's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from compressors.model.errors import InputError, UnsupportedError
from compressors.quantize import GGMLQuantizationType, dequantize_rows, fallback_type, row_bytes
from compressors.quantize.kernels import quantize_rows
from tests.llama_quantize import CODEBOOK_TYPES, FILE_TYPES, check_bytes, three_experts

_T = GGMLQuantizationType
_SCALAR_TYPES = [ggml_type for ggml_type in FILE_TYPES if ggml_type not in CODEBOOK_TYPES]


@pytest.fixture(scope="module")
def float32_file(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Path:
    """Three experts of one layer: rows of 256 values, and of 128, which blocks of 256 do not divide."""
    folder = tmp_path_factory.mktemp("quantize")
    return three_experts(toy_checkpoint(folder, n_layers=1), folder)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("ggml_type", _SCALAR_TYPES, ids=attrgetter("name"))
def test_bytes_are_those_of_llama_cpp(
    float32_file: Path, tmp_path: Path, ggml_type: GGMLQuantizationType, weighted: bool
) -> None:
    check_bytes(float32_file, tmp_path / "quantized.gguf", ggml_type, weighted=weighted)


@pytest.mark.parametrize("ggml_type", [_T.F32, *FILE_TYPES], ids=attrgetter("name"))
def test_dequantized_values_are_those_of_gguf_py(ggml_type: GGMLQuantizationType) -> None:
    random = np.random.default_rng(1)
    if ggml_type in CODEBOOK_TYPES:  # which take seconds to set up; any bytes are rows of theirs
        quantized = random.integers(0, 256, (5, row_bytes(ggml_type, 512)), np.uint8)
        np.testing.assert_array_equal(dequantize_rows(quantized, ggml_type, 512), _dequantized(quantized, ggml_type))
        return
    values = random.standard_normal((5, 512)).astype(np.float32)
    quantized = quantize_rows(torch.from_numpy(values), ggml_type, name="noise")
    assert quantized.shape == (5, row_bytes(ggml_type, 512))
    restored = dequantize_rows(quantized, ggml_type, 512)
    np.testing.assert_array_equal(restored, _dequantized(quantized, ggml_type))
    bits = 8 * row_bytes(ggml_type, 512) / 512
    error = np.linalg.norm(restored - values) / np.linalg.norm(values)
    assert error <= (0 if bits == 32 else 3.6 * 2.0**-bits + 2.0**-9)


def _dequantized(quantized: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    if ggml_type is _T.Q2_0:  # gguf-py does not know it: ``block_q2_0`` in ``ggml/src/ggml-common.h``
        blocks = quantized.reshape(-1, 18)
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        codes = (blocks[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
        return ((codes.reshape(-1, 64).astype(np.float32) - 1) * scales).reshape(len(quantized), -1)
    stored = {_T.F32: quantized.view(np.float32), _T.F16: quantized.view(np.float16)}.get(ggml_type, quantized)
    return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(ggml_type))


def test_bfloat16_rounds_to_nearest_even() -> None:
    halfway = torch.tensor([[1 + 2.0**-8, 1 + 3 * 2.0**-8]])
    restored = dequantize_rows(
        quantize_rows(halfway, GGMLQuantizationType.BF16, name="x"), GGMLQuantizationType.BF16, 2
    )
    np.testing.assert_array_equal(restored, np.array([[1, 1 + 2.0**-6]], dtype=np.float32))


def test_grouping_rows_into_calls_and_threads_changes_nothing() -> None:
    random = np.random.default_rng(2)
    values = torch.from_numpy(random.standard_normal((64, 256)).astype(np.float32))
    importance = torch.from_numpy(random.gamma(0.5, size=256).astype(np.float32))

    def quantize(rows: torch.Tensor) -> npt.NDArray[np.uint8]:
        return quantize_rows(rows, GGMLQuantizationType.Q4_K, importance, name="noise")

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(quantize, values.tensor_split([1, 10, 40])))
    np.testing.assert_array_equal(np.concatenate(parts), quantize(values))


def test_rows_that_are_not_contiguous_are_read_right() -> None:
    values = torch.randn(256, 8, generator=torch.Generator().manual_seed(3)).T
    np.testing.assert_array_equal(
        quantize_rows(values, GGMLQuantizationType.Q8_0, name="x"),
        quantize_rows(values.contiguous(), GGMLQuantizationType.Q8_0, name="x"),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ggml_type", [GGMLQuantizationType.F32, GGMLQuantizationType.Q4_K], ids=lambda kind: kind.name)
def test_weights_are_widened_without_loss(dtype: torch.dtype, ggml_type: GGMLQuantizationType) -> None:
    """More rows than are widened at a time, and the smallest and largest numbers of the dtype."""
    values = torch.randn(1500, 256, generator=torch.Generator().manual_seed(4)).to(dtype)
    limits = torch.finfo(dtype)
    values[700, :4] = torch.tensor([limits.max, limits.min, limits.tiny, limits.smallest_normal / 2]).to(dtype)
    np.testing.assert_array_equal(
        quantize_rows(values, ggml_type, name="x"), quantize_rows(values.float(), ggml_type, name="x")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float, dtype: torch.dtype) -> None:
    values = torch.zeros(3, 1 << 17, dtype=dtype)
    values[2, 7] = bad
    with pytest.raises(InputError, match=r"blk\.3\.weight: value \[2, 7\]"):
        quantize_rows(values, GGMLQuantizationType.Q8_0, name="blk.3.weight")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_importance_is_refused_by_name(bad: float) -> None:
    importance = torch.ones(32)
    importance[3] = bad
    with pytest.raises(InputError, match="expert down"):
        quantize_rows(torch.zeros(2, 32), GGMLQuantizationType.Q4_0, importance, name="expert down")


def test_rows_that_blocks_do_not_divide_get_llama_cpp_s_types() -> None:
    assert fallback_type(_T.F32, 100) is _T.F32
    assert fallback_type(_T.IQ2_XXS, 256) is _T.IQ2_XXS
    assert fallback_type(_T.IQ2_XXS, 128) is _T.IQ4_NL
    assert fallback_type(_T.Q2_K, 128) is _T.Q4_0
    assert (fallback_type(_T.Q2_0, 128), fallback_type(_T.Q2_0, 96)) == (_T.Q2_0, _T.Q4_0)
    assert fallback_type(_T.Q4_K, 100) is fallback_type(_T.Q4_0, 100) is fallback_type(_T.Q2_0, 100) is _T.F16
    with pytest.raises(UnsupportedError, match="Q8_1 is not supported"):
        fallback_type(_T.Q8_1, 256)


def test_values_too_large_for_float16_are_refused() -> None:
    quantize_rows(torch.tensor([[65504.0, -1.0]]), _T.F16, name="x")
    with pytest.raises(InputError, match=r"blk\.3\.weight: a value of size 70000.* cannot be written as F16"):
        quantize_rows(torch.tensor([[1.0, -70000.0]]), _T.F16, name="blk.3.weight")
