"""Our quantized bytes against those of llama.cpp's own quantizer, and the way back against gguf-py's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf.constants import LlamaFileType

from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.student import Student
from compressors.quantize import GGMLQuantizationType, dequantize_rows, fallback_type, quantize_rows, row_bytes
from exporter.gguf.writer import write_gguf

_FILE_TYPES: Mapping[GGMLQuantizationType, LlamaFileType] = {
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    GGMLQuantizationType.Q5_K: LlamaFileType.MOSTLY_Q5_K_S,
    GGMLQuantizationType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q4_K: LlamaFileType.MOSTLY_Q4_K_S,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
}
_ALL_TYPES = [GGMLQuantizationType.F32, *_FILE_TYPES]


@pytest.fixture(scope="module")
def float32_file(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Path:
    """One layer of the fine model: rows of 256 values, and of 128, where 256-value blocks do not fit."""
    folder = tmp_path_factory.mktemp("quantize")
    student = Student.teacher(Checkpoint(toy_checkpoint(folder, n_layers=1)))
    write_gguf(student, "F32", folder / "f32.gguf", name="toy", threads=1)
    return folder / "f32.gguf"


def _quantize_with_llama_cpp(
    source: Path, target: Path, ggml_type: GGMLQuantizationType, importance: Mapping[str, npt.NDArray[np.float32]]
) -> None:
    params = api.llama_model_quantize_default_params()
    params.nthread = 1
    params.ftype = int(_FILE_TYPES[ggml_type])
    params.token_embedding_type = api.GGML_TYPE_F32  # the largest tensor, and nothing new
    params.pure = True
    entries = (api.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    if importance:
        params.imatrix = entries
    assert api.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("ggml_type", _FILE_TYPES, ids=lambda ggml_type: ggml_type.name)
def test_bytes_are_those_of_llama_cpp(
    float32_file: Path, tmp_path: Path, ggml_type: GGMLQuantizationType, weighted: bool
) -> None:
    random = np.random.default_rng(0)
    source = gguf.GGUFReader(float32_file)
    importance: dict[str, npt.NDArray[np.float32]] = {}
    for tensor in source.tensors if weighted else ():
        if len(tensor.data.shape) >= 2:
            n_matrices = tensor.data.shape[0] if tensor.data.ndim == 3 else 1
            importance[tensor.name] = random.gamma(0.5, size=(n_matrices, tensor.data.shape[-1])).astype(np.float32)
    # an expert that saw no token: llama-quantize puts ones in its place, so must we
    theirs = {name: np.concatenate([values[:-1], np.ones_like(values[-1:])]) for name, values in importance.items()}
    ours = {name: np.concatenate([values[:-1], np.zeros_like(values[-1:])]) for name, values in importance.items()}
    _quantize_with_llama_cpp(float32_file, tmp_path / "quantized.gguf", ggml_type, theirs)
    quantized = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "quantized.gguf").tensors}
    checked = 0
    for tensor in source.tensors:
        expected = quantized[tensor.name]
        if expected.tensor_type == GGMLQuantizationType.F32:
            continue
        row_length = tensor.data.shape[-1]
        assert expected.tensor_type == fallback_type(ggml_type, row_length), tensor.name
        matrices = tensor.data.reshape(-1, tensor.data.shape[-2], row_length)
        weights = torch.from_numpy(ours[tensor.name]) if tensor.name in ours else [None] * len(matrices)
        rows = [
            quantize_rows(matrix, fallback_type(ggml_type, row_length), weights_N, name=tensor.name)
            for matrix, weights_N in zip(torch.from_numpy(matrices.copy()), weights, strict=True)
        ]
        assert np.concatenate(rows).tobytes() == expected.data.tobytes(), tensor.name
        checked += 1
    assert checked == 7  # query, key, value, output; gate, up, down


@pytest.mark.parametrize("ggml_type", _ALL_TYPES, ids=lambda ggml_type: ggml_type.name)
def test_dequantized_values_are_those_of_gguf_py(ggml_type: GGMLQuantizationType) -> None:
    values = np.random.default_rng(1).standard_normal((5, 512)).astype(np.float32)
    quantized = quantize_rows(torch.from_numpy(values), ggml_type, name="noise")
    assert quantized.shape == (5, row_bytes(ggml_type, 512))
    restored = dequantize_rows(quantized, ggml_type, 512)
    stored = quantized.view(np.float32) if ggml_type is GGMLQuantizationType.F32 else quantized
    np.testing.assert_array_equal(restored, gguf.quants.dequantize(stored, ggml_type))
    bits = 8 * row_bytes(ggml_type, 512) / 512
    assert np.abs(restored - values).max() <= (0 if bits == 32 else 8 * 2.0**-bits + 2.0**-7)


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


def test_rows_that_fit_no_block_are_refused() -> None:
    assert fallback_type(GGMLQuantizationType.F32, 100) is GGMLQuantizationType.F32
    with pytest.raises(UnsupportedError, match="rows of 100 values cannot be stored as Q4_K"):
        fallback_type(GGMLQuantizationType.Q4_K, 100)
    with pytest.raises(UnsupportedError, match="IQ2_XXS is not supported"):
        fallback_type(GGMLQuantizationType.IQ2_XXS, 256)
