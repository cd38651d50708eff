"""The files that the ONNX benchmark compares hold the same numbers, and its page names what misses a bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.onnx.__main__ import Row, page
from benchmarks.onnx.files import FORMATS, write_gguf_file, write_onnx_folder
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.opening import open_source


def test_both_files_of_4_bits_hold_the_same_numbers(tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> None:
    folder = toy_checkpoint(tmp_path, n_layers=1)
    spec = open_source(folder).spec
    (form,) = (form for form in FORMATS if form.bits == 4)
    of_gguf = GgufWeights(write_gguf_file(folder, form, tmp_path).path, spec)
    written = write_onnx_folder(folder, form.onnx[0], tmp_path)
    of_onnx = OnnxWeights(written.path, spec)
    assert written.n_bytes == sum(path.stat().st_size for path in written.path.iterdir())
    for tensor, layer in spec.places:
        if tensor.is_quantizable and not tensor.is_per_expert:
            role = tensor.role
            assert torch.equal(of_onnx.tensor(role, layer), of_gguf.tensor(role, layer)), (role, layer)


def test_the_page_names_what_misses_a_bar() -> None:
    rows = [
        Row("olmoe", 4, "llama.cpp, Q4_0", 1_000_000, 1.0, 2_000_000, 0.1, 0.01),
        Row("olmoe", 4, "ONNX Runtime, Q4_0, int8 inputs", 1_000_000, 1.0, 2_000_000, 0.16, 0.009),
        Row("olmoe", 4, "ONNX Runtime, 4@128, int8 inputs", 900_000, None, None, 0.12, 0.014),
    ]
    text = "\n".join(page(rows))
    assert "| 4 | ONNX Runtime, Q4_0, int8 inputs | 1 | 1.0 | 2 | 9.0 (0.90) | 160 (1.60) |" in text
    assert "Q4_0, int8 inputs: a token 0.90 x, a prompt 1.60 x MISSED" in text
    assert "4@128, int8 inputs: a token 1.40 x MISSED, a prompt 1.20 x" in text


def test_the_page_compares_a_token_with_optimum_s_graph() -> None:
    rows = [
        Row("qwen3-30b", 32, "llama.cpp, F32", 8_000_000, 1.0, 9_000_000, 0.5, 0.05),
        Row("qwen3-30b", 32, "ONNX Runtime, optimum's graph", 8_000_000, 9.0, None, 0.9, 0.06),
        Row("qwen3-30b", 4, "llama.cpp, Q4_0", 1_000_000, 1.0, 2_000_000, 0.1, 0.01),
        Row("qwen3-30b", 4, "ONNX Runtime, Q4_0, int8 inputs", 1_000_000, 1.0, 2_000_000, 0.1, 0.01),
        Row("qwen3-30b", 4, "ONNX Runtime, 4@128, int8 inputs", 1_000_000, 1.0, 2_000_000, 0.1, 0.0125),
    ]
    text = "\n".join(page(rows))
    assert "optimum's graph: 6.0 x the time of ONNX Runtime, Q4_0, int8 inputs for a token\n" in text
    assert "optimum's graph: 4.8 x the time of ONNX Runtime, 4@128, int8 inputs for a token MISSED" in text
