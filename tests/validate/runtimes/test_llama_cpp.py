"""llama.cpp against stock transformers in float32, on the trained models: logits, routing, text; and its cost."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.writing.gguf.writer import write_gguf
from validate.metrics.generation import greedy
from validate.runtimes.backend import scored_positions
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.llama_cpp_routing import RoutingCollector

_LOGIT_TOLERANCE = 1e-3
_ROUTING_TOLERANCE = 1e-3  # share of positions where float rounding may decide between two experts
_REPOSITORY = Path(__file__).parents[3]


@dataclass(frozen=True)
class _Pair:
    """One student in both runtimes."""

    reference: Any
    path: Path


def _sliced_reference(folder: Path, experts: ExpertMap) -> Any:
    """Stock transformers with only the kept experts, float32."""
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = AutoConfig.from_pretrained(folder)
    config.num_experts = config.num_local_experts = len(experts.kept[0])
    state = source.state_dict()
    for name, tensor in state.items():
        if ".mlp.experts." in name or ".mlp.gate." in name:
            state[name] = tensor[list(experts.kept[int(name.split(".")[2])])]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module", params=["all experts", "half of the experts"])
def pair(request: pytest.FixtureRequest, family_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> _Pair:
    checkpoint = open_source(family_folder)
    student = Student.teacher(checkpoint)
    if request.param != "all experts":
        random, total = np.random.default_rng(5), checkpoint.spec.n_experts
        kept = [tuple(random.permutation(total)[: total // 2].tolist()) for _ in range(checkpoint.spec.n_layers)]
        student = Student(checkpoint, ExpertMap.keeping(total, tuple(kept)))
    path = tmp_path_factory.mktemp("llama_cpp") / "f32.gguf"
    write_gguf(student, "F32", path, name="x", threads=2)
    return _Pair(_sliced_reference(family_folder, student.experts), path)


@torch.no_grad()
def _run_reference(
    model: Any, tokens_T: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Logits [T, V], chosen experts [L, T, K] and their weights."""
    routed: list[Any] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: routed.append(output))
        for layer in model.model.layers
    ]
    logits_TV = model(torch.from_numpy(tokens_T)[None]).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    weights = np.stack([output[1].numpy() for output in routed])
    return logits_TV, np.stack([output[2].numpy() for output in routed]), weights


def _by_expert(experts_LTK: npt.NDArray[Any], weights_LTK: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.take_along_axis(weights_LTK, experts_LTK.argsort(axis=-1), axis=-1)


def test_logits_and_routing_are_those_of_transformers(pair: _Pair, heldout_tokens: npt.NDArray[np.int64]) -> None:
    backend = LlamaCppBackend(pair.path, kv_type="f32", threads=2)
    chunks_BT = heldout_tokens[20_000:21_024].reshape(2, 512)
    different = 0
    for tokens_T, output in zip(chunks_BT, backend.run(chunks_BT), strict=True):
        logits_TV, experts_LTK, weights_LTK = _run_reference(pair.reference, tokens_T)
        routing = output.routing
        same_T = (np.sort(experts_LTK) == np.sort(routing.experts_LTK)).all(axis=(0, 2))
        different += int((~same_T).sum())
        scored = scored_positions(len(tokens_T))
        difference_SV = np.abs(output.logits_SV - logits_TV[scored])[same_T[scored]]
        assert difference_SV.max() <= _LOGIT_TOLERANCE
        expected = _by_expert(experts_LTK, weights_LTK)[:, same_T]
        np.testing.assert_allclose(_by_expert(routing.experts_LTK, routing.weights_LTK)[:, same_T], expected, atol=1e-4)
        assert (np.diff(routing.weights_LTK) <= 0).all()  # by falling weight
    assert different <= _ROUTING_TOLERANCE * chunks_BT.size


def test_what_only_makes_logits_is_skipped_where_they_are_not_wanted(
    pair: _Pair, heldout_tokens: npt.NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs are the same to the bit with and without it."""
    chunks_BT = heldout_tokens[20_000:21_024].reshape(2, 512)
    found = [replace(output, logits_SV=output.logits_SV.copy()) for output in _llama_cpp(pair.path).run(chunks_BT)]
    monkeypatch.setattr(RoutingCollector, "without_logits", lambda collector, last_layer: nullcontext())
    for output, whole in zip(found, _llama_cpp(pair.path).run(chunks_BT), strict=True):
        np.testing.assert_array_equal(output.logits_SV, whole.logits_SV)
        np.testing.assert_array_equal(output.routing.experts_LTK, whole.routing.experts_LTK)
        np.testing.assert_array_equal(output.routing.weights_LTK, whole.routing.weights_LTK)


def _llama_cpp(path: Path) -> LlamaCppBackend:
    return LlamaCppBackend(path, threads=2)


def test_greedy_text_is_that_of_transformers(pair: _Pair, heldout_tokens: npt.NDArray[np.int64]) -> None:
    prompt = heldout_tokens[5000:5040]
    generated = pair.reference.generate(
        torch.from_numpy(prompt)[None], max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
    )
    backend = LlamaCppBackend(pair.path, kv_type="f32", threads=2)
    assert backend.generate(prompt.tolist(), 12, greedy) == generated[0, 40:].tolist()


@pytest.fixture(scope="module")
def quantized_file(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    student = Student.teacher(open_source(toy_checkpoint(folder, n_layers=2)))
    write_gguf(student, "Q4_K", folder / "q4_k.gguf", name="x", threads=2)
    return folder / "q4_k.gguf"


def test_chunks_longer_than_a_batch_are_routed_whole(
    quantized_file: Path, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    tokens_BT = heldout_tokens[:700].reshape(1, 700)
    (output,) = LlamaCppBackend(quantized_file, n_ctx=1024, threads=2).run(tokens_BT)
    assert output.logits_SV.shape == (349, 4096)
    assert output.routing.experts_LTK.shape == output.routing.weights_LTK.shape == (2, 700, 4)
    np.testing.assert_allclose(output.routing.weights_LTK.sum(axis=-1), 1, atol=1e-3)
    assert (np.diff(np.sort(output.routing.experts_LTK)) > 0).all()  # no expert twice


def test_logits_outlive_the_backend(quantized_file: Path, heldout_tokens: npt.NDArray[np.int64]) -> None:
    (output,) = LlamaCppBackend(quantized_file, n_ctx=128, threads=2).run(heldout_tokens[:96].reshape(1, 96))
    gc.collect()
    assert np.isfinite(output.logits_SV).all()
    assert output.logits_SV.shape == (47, 4096)


def test_every_row_starts_from_an_empty_cache(quantized_file: Path, heldout_tokens: npt.NDArray[np.int64]) -> None:
    tokens_BT = heldout_tokens[:192].reshape(2, 96)
    backend = LlamaCppBackend(quantized_file, n_ctx=128, flash_attention=True, threads=2)
    _, second = backend.run(tokens_BT)
    second_SV = second.logits_SV.copy()
    (alone,) = backend.run(tokens_BT[1:])
    np.testing.assert_array_equal(second_SV, alone.logits_SV)
    np.testing.assert_array_equal(second.routing.experts_LTK, alone.routing.experts_LTK)


def test_runtime_and_version_are_named(quantized_file: Path) -> None:
    backend = LlamaCppBackend(quantized_file, threads=1)
    assert backend.runtime == "llama.cpp"
    assert "ggml" in backend.version


def test_bad_input_is_named(quantized_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        LlamaCppBackend(tmp_path / "none.gguf", threads=1)
    (tmp_path / "text.gguf").write_text("no model at all, but a text", encoding="ascii")
    with pytest.raises(InputError, match=r"cannot be loaded by llama\.cpp: .*magic"):
        LlamaCppBackend(tmp_path / "text.gguf", threads=1)
    whole = quantized_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not within the file bounds"):
        LlamaCppBackend(tmp_path / "cut.gguf", threads=1)
    with pytest.raises(InputError, match="--kv-type q9"):
        LlamaCppBackend(quantized_file, kv_type="q9", threads=1)
    backend = LlamaCppBackend(quantized_file, n_ctx=64, threads=1)
    with pytest.raises(InputError, match="100 tokens after 0"):
        list(backend.run(np.zeros((1, 100), dtype=np.int64)))
    with pytest.raises(InputError, match="token 4096 is not in the vocabulary"):
        backend.generate([4096], 1, greedy)


def test_cost_is_measured_in_a_process_of_its_own(quantized_file: Path) -> None:
    script = (
        "import dataclasses, json, pathlib, sys; from validate.runtimes.llama_cpp import measure;"
        "cost = measure(pathlib.Path(sys.argv[1]), context=1024, kv_type='f16', threads=2, prompt_tokens=[7, 8, 9]);"
        "print(json.dumps(dataclasses.asdict(cost)))"
    )
    command = [sys.executable, "-c", script, str(quantized_file)]
    answer = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=True)
    cost = json.loads(answer.stdout)
    assert cost["peak_rss_bytes"] > cost["base_rss_bytes"] + quantized_file.stat().st_size
    assert (cost["prefill_runs"], cost["decode_runs"]) == (2, 32)  # 992 tokens in pieces of 512
    buffers, file_bytes = cost.pop("buffers"), quantized_file.stat().st_size
    assert cost.pop("device_bytes") is None and all(value > 0 for value in cost.values())
    assert buffers["kv_cache"] == 2 * 1024 * 2 * 4 * 32 * 2  # layers, tokens, keys and values, heads, width, bytes
    assert 0.95 * file_bytes < buffers["weights"] <= file_bytes, "all but tokenizer and header, to 10 KB"
    assert buffers["output"] == pytest.approx(4 * 4096, abs=0.01 * 2**20)  # logits of one position, printed in 10 KB
    assert buffers["compute"] > 4 * 512 * 256
    assert buffers["recurrent_state"] == 0
