"""llama-quantize without its command line: the function of llama.cpp's library that the tool calls."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt
import torch

from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from compressors.quantize import GGMLQuantizationType, fallback_type
from compressors.quantize.kernels import quantize_rows
from exporter.writing.gguf.mixes import MIXES
from exporter.writing.gguf.writer import write_gguf
from validate.runtimes.llama_cpp_session import start_runtime

__all__ = ["CODEBOOK_TYPES", "FILE_TYPES", "check_bytes", "quantize", "three_experts", "types_in_a_dry_run"]

_T = GGMLQuantizationType
FILE_TYPES: Mapping[GGMLQuantizationType, int] = {
    mix.base: mix.file_type for mix in reversed(MIXES.values()) if mix.base is not _T.F32
}
"""A mix of each type, as llama.cpp numbers them."""

CODEBOOK_TYPES = frozenset({_T.IQ1_S, _T.IQ1_M, _T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ3_XXS, _T.IQ3_S})

_LINE = re.compile(r"\] (\S+) +- \[.*\], type = +(\S+), (?:size = .* -> .* \((\S+)\))?")


def quantize(
    source: Path,
    target: Path,
    file_type: int,
    importance: Mapping[str, npt.NDArray[np.float32]],
    *,
    pure: bool = False,
    dry_run: bool = False,
) -> None:
    """Quantizes a GGUF file; ``pure`` gives all matrices the same type, but leaves the embedding in float32."""
    params = api.llama_model_quantize_default_params()
    params.nthread = 1
    params.ftype = file_type
    params.dry_run = dry_run
    params.pure = pure
    if pure:
        params.token_embedding_type = api.GGML_TYPE_F32  # the largest tensor, and nothing new
    entries = (api.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    if importance:
        params.imatrix = entries
    assert api.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0


def three_experts(toy: Path, folder: Path) -> Path:
    """A float32 file of a toy of one layer, three of its 32 experts kept."""
    student = Student(open_source(toy), ExpertMap.keeping(32, [range(3)]))
    write_gguf(student, "F32", folder / "f32.gguf", name="toy", threads=1)
    return folder / "f32.gguf"


def check_bytes(float32_file: Path, target: Path, ggml_type: GGMLQuantizationType, *, weighted: bool) -> None:
    """Compares all matrices but the embedding with what llama.cpp makes of them."""
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
    quantize(float32_file, target, FILE_TYPES[ggml_type], theirs, pure=True)
    quantized = GgufFile(target)
    checked = 0
    for tensor in source.tensors:
        entry = quantized.tensors[tensor.name]
        if entry.ggml_type is _T.F32:
            continue
        row_length = tensor.data.shape[-1]
        assert entry.ggml_type is fallback_type(ggml_type, row_length), tensor.name
        matrices = tensor.data.reshape(-1, tensor.data.shape[-2], row_length)
        weights = torch.from_numpy(ours[tensor.name]) if tensor.name in ours else [None] * len(matrices)
        rows = [
            quantize_rows(matrix, entry.ggml_type, weights_N, name=tensor.name)
            for matrix, weights_N in zip(torch.from_numpy(matrices.copy()), weights, strict=True)
        ]
        stored = quantized.read_rows(entry, 0, entry.n_bytes // entry.row_bytes)
        np.testing.assert_array_equal(np.concatenate(rows), stored, err_msg=tensor.name)
        checked += 1
    assert checked == 7  # query, key, value, output; gate, up, down


def types_in_a_dry_run(source: Path, file_type: int) -> dict[str, str]:
    """The type that each tensor of a float32 file would get beside an importance matrix; no weight is read."""
    lines: list[bytes] = []

    @api.llama_log_callback
    def listen(_level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        lines.append(text)

    api.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        quantize(source, source.with_suffix(".none"), file_type, {"nothing": np.ones(1, np.float32)}, dry_run=True)
    finally:
        start_runtime.cache_clear()  # other tests read the log as our own code does
        start_runtime()
    found = _LINE.finditer(b"".join(lines).decode())
    return {match[1]: (match[3] or match[2]).upper() for match in found}
