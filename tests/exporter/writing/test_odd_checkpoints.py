"""Odd but complete checkpoints: their files predict in the runtimes the same as transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from tests.float8_checkpoints import write_float8
from validate.runtimes.backend import scored_positions
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend

_N_TOKENS = 64
_SINGLE = "model.safetensors"
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _mixed(folder: Path) -> None:
    """Norms, routers and two experts in float32, beside bfloat16."""
    wide = (".mlp.gate.", "norm.", ".experts.3.", ".experts.5.down")
    tensors = load_file(folder / _SINGLE)
    tensors = {name: t.float() if any(part in name for part in wide) else t for name, t in tensors.items()}
    save_file(tensors, folder / _SINGLE, {"format": "pt"})


def _without_prefix(folder: Path) -> None:
    tensors = load_file(folder / _SINGLE)
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, folder / _SINGLE, {"format": "pt"})


def _twice(folder: Path) -> None:
    """One expert's matrix lies in both shards; the last one's is another."""
    tensors = load_file(folder / _SINGLE)
    (folder / _SINGLE).unlink()
    names = sorted(tensors)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    twice = "model.layers.0.mlp.experts.1.up_proj.weight"
    assert twice in first
    save_file({name: tensors[name] for name in first}, folder / _SHARDS[0], {"format": "pt"})
    others = {name: tensors[name] for name in second} | {twice: 3 * tensors[twice]}
    save_file(others, folder / _SHARDS[1], {"format": "pt"})
    index = {name: _SHARDS[name in second] for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture(params=["mixed", "without prefix", "twice", "float8"])
def folder(
    request: pytest.FixtureRequest,
    toy_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> Path:
    """One layer of the Qwen3-MoE, stored in each of these ways."""
    toy = toy_checkpoint(tmp_path, n_layers=1)
    if request.param == "float8":
        return write_float8(toy, tmp_path / "fp8")
    {"mixed": _mixed, "without prefix": _without_prefix, "twice": _twice}[request.param](toy)
    return toy


def test_the_runtimes_predict_what_transformers_predicts(
    folder: Path, heldout_tokens: npt.NDArray[np.int64], tmp_path: Path
) -> None:
    tokens_BT = heldout_tokens[:_N_TOKENS][None]
    # float8 is dequantized to the dtype of config.json, as on the way to our files; all else is exact in float32
    dtype = "auto" if folder.name == "fp8" else torch.float32
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float().eval()
    with torch.no_grad():
        wanted_SV = stock(torch.from_numpy(tokens_BT)).logits[0, scored_positions(_N_TOKENS)].log_softmax(-1)
    student = Student.teacher(open_source(folder))
    write_gguf(student, "F32", tmp_path / "x.gguf", name="x", threads=1)
    write_onnx(student, "F32", tmp_path / "onnx", threads=1)
    for runtime in (
        LlamaCppBackend(tmp_path / "x.gguf", n_ctx=_N_TOKENS, threads=1),
        OnnxRuntimeBackend(tmp_path / "onnx", threads=1),
    ):
        (chunk,) = runtime.run(tokens_BT)
        found_SV = torch.from_numpy(np.array(chunk.logits_SV)).log_softmax(-1)
        divergence = (wanted_SV.exp() * (wanted_SV - found_SV)).sum(-1).mean()
        assert abs(float(divergence)) < 1e-6, runtime.runtime
