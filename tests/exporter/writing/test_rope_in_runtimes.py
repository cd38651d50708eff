"""Scaled rotary embeddings inside both runtimes, against stock transformers; positions beyond the trained ones too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.model.description.gguf_rope import LONG_FACTORS, SHORT_FACTORS
from compressors.model.errors import UnsupportedError
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from exporter.publishing.settings_deviations import settings_deviations
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.gguf.writer import predict_file_size, write_gguf
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE
from exporter.writing.onnx.writer import predict_size, write_onnx
from tests.exporter.against_transformers import SAME, divergence, log_probs
from validate.runtimes.backend import Backend
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.runtimes.torch import TorchBackend

_HALF_HEAD = 16

_LINEAR = {"rope_type": "linear", "factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 96}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 96,
}
_LONGROPE = {
    "rope_type": "longrope",
    "factor": 16.0,
    "short_factor": [1.0 + 0.05 * index for index in range(_HALF_HEAD)],
    "long_factor": [1.5 + 0.5 * index for index in range(_HALF_HEAD)],
    "original_max_position_embeddings": 256,  # llama.cpp rounds contexts up to a multiple of it
}
_SCALINGS: dict[str, dict[str, Any]] = {
    "linear": _LINEAR,
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": _YARN,
    "yarn, attention factor": _YARN | {"attention_factor": 1.3},
    "yarn, other betas": _YARN | {"beta_fast": 4.0, "beta_slow": 0.5},
    "yarn of DeepSeek": _YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn, not truncated": _YARN | {"truncate": False},
    "llama3": _LLAMA3,
    "longrope": _LONGROPE,
}
_NEEDS_FACTORS = ("yarn, other betas", "yarn, not truncated", "llama3", "longrope")
"""Scalings that llama.cpp holds only for architectures whose graph divides the angles by a tensor of the file."""

Scaled = Callable[[str, str], Source]


@pytest.fixture(scope="module")
def scaled(toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Scaled:
    """``scaled(model, scaling)``: two layers of a trained model, said to be scaled."""
    folders: dict[str, Path] = {}

    def checkpoint(model: str, scaling: str) -> Source:
        if model not in folders:
            folders[model] = toy_checkpoint(tmp_path_factory.mktemp(model), n_layers=2, model=model)
        config = json.loads((folders[model] / "config.json").read_text())
        config["rope_scaling"] = _SCALINGS[scaling]
        (folders[model] / "config.json").write_text(json.dumps(config))
        return open_source(folders[model])

    return checkpoint


_CASES = [("coarse", scaling) for scaling in _SCALINGS] + [
    ("fine", "linear"),
    ("fine", "yarn"),
    ("fine", "yarn of DeepSeek"),
    ("fine", "llama3"),
    ("olmoe", "yarn, attention factor"),
]


@pytest.mark.parametrize(("model", "scaling"), _CASES)
def test_both_runtimes_compute_what_transformers_does(
    scaled: Scaled, tmp_path: Path, heldout_tokens: npt.NDArray[np.int64], model: str, scaling: str
) -> None:
    """Texts are longer than what the model was trained on before it was scaled, and shorter."""
    checkpoint = scaled(model, scaling)
    student = Student.teacher(checkpoint)
    write_onnx(student, "F32", tmp_path / "onnx", threads=1)
    n_bytes = sum((tmp_path / "onnx" / name).stat().st_size for name in (MODEL_FILE, DATA_FILE))
    assert predict_size(student.spec, "F32") == n_bytes
    in_gguf = model == "coarse" or scaling not in _NEEDS_FACTORS
    reference = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True)
    for n_tokens in (320, 64):
        tokens_BT = heldout_tokens[: 2 * n_tokens].reshape(2, n_tokens)
        expected = log_probs(reference, tokens_BT)
        backends: list[Backend] = [TorchBackend(student), OnnxRuntimeBackend(tmp_path / "onnx", threads=1)]
        if in_gguf:
            backends.append(_gguf(student, tmp_path / "model.gguf", n_ctx=n_tokens))
        for backend in backends:
            assert divergence(expected, backend, tokens_BT) < SAME, (backend.runtime, n_tokens)


def test_what_llama_cpp_cannot_turn_by_is_refused_by_name(scaled: Scaled) -> None:
    for scaling in ("llama3", "longrope"):
        spec = scaled("fine", scaling).spec
        kind = _SCALINGS[scaling]["rope_type"]
        with pytest.raises(UnsupportedError, match=f"qwen3moe graph cannot turn by the angles of rope_type '{kind}'"):
            plan_tensors(spec, "F32")


@pytest.mark.parametrize("scaling", ["yarn, other betas", "yarn, not truncated"])
def test_constants_of_llama_cpp_s_yarn_are_written_and_named(
    scaling: str, scaled: Scaled, tmp_path: Path, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    checkpoint = scaled("fine", scaling)
    (named,) = settings_deviations(checkpoint, "gguf")
    assert "beta_fast 32, beta_slow 1 and truncate true" in named
    assert not list(settings_deviations(checkpoint, "onnx"))
    tokens_BT = heldout_tokens[:640].reshape(2, 320)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True)
    backend = _gguf(Student.teacher(checkpoint), tmp_path / "model.gguf", n_ctx=320)
    # small, and no smaller than what is said: without the scaling it would be far more
    assert SAME < divergence(log_probs(reference, tokens_BT), backend, tokens_BT) < 0.1


def test_factors_are_tensors_of_the_file(scaled: Scaled, tmp_path: Path) -> None:
    student = Student.teacher(scaled("coarse", "longrope"))
    write_gguf(student, "Q8_0", tmp_path / "model.gguf", name="toy", threads=1)
    file = GgufFile(tmp_path / "model.gguf")
    assert file.metadata["llama.rope.scaling.type"] == "longrope"
    for name, key in ((SHORT_FACTORS, "short_factor"), (LONG_FACTORS, "long_factor")):
        values = np.frombuffer(file.read_rows(file.tensors[name], 0, 1).tobytes(), np.float32)
        np.testing.assert_array_equal(values, np.array(_LONGROPE[key], np.float32))


def test_llama_cpp_takes_the_long_factors_for_short_texts_in_a_long_context(
    scaled: Scaled, tmp_path: Path, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    """A difference that no file can mend; the plan names it."""
    checkpoint = scaled("coarse", "longrope")
    tokens_BT = heldout_tokens[:128].reshape(2, 64)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True)
    gguf = _gguf(Student.teacher(checkpoint), tmp_path / "model.gguf", n_ctx=512)
    assert divergence(log_probs(reference, tokens_BT), gguf, tokens_BT) > 1e-3


def _gguf(student: Student, path: Path, n_ctx: int) -> LlamaCppBackend:
    write_gguf(student, "F32", path, name="toy", threads=1)
    assert predict_file_size(student.spec, student.source, "F32", "toy") == path.stat().st_size
    return LlamaCppBackend(path, n_ctx=n_ctx, kv_type="f32", threads=1)


def test_onnx_runtime_turns_a_growing_text_as_transformers_does(
    scaled: Scaled, tmp_path: Path, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    """From the 257th token on by the long factors; what is in the cache stays as it was turned."""
    checkpoint = scaled("coarse", "longrope")
    write_onnx(Student.teacher(checkpoint), "F32", tmp_path / "onnx", threads=1)
    prompt = heldout_tokens[:250].tolist()
    logits: list[torch.Tensor] = []

    def choose(logits_V: npt.NDArray[np.float32]) -> int:
        logits.append(torch.from_numpy(logits_V.copy()))
        return int(logits_V.argmax())

    OnnxRuntimeBackend(tmp_path / "onnx", threads=1).generate(prompt, 12, choose)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, local_files_only=True)
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    ).logits
    torch.testing.assert_close(torch.stack(logits), torch.cat(expected), atol=1e-3, rtol=0)
