"""The graph in ONNX Runtime against stock transformers in float32, holding the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from exporter.writing.onnx.graph import build_model
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE, plan_tensors
from exporter.writing.onnx.writer import write_onnx
from tests.exporter.writing.onnx.session import Logits, Session, Tokens, padded

_EXACT = 1e-3  # logits reach 17; float32 in another order of summation gives 2e-5
_INT8_HEAD = 0.15  # the head's inputs quantized to int8 in blocks of 32
_INT8_DIVERGENCE = 1e-3  # nats, of all inputs; llama.cpp's are the same
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def _reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _logits(model: PreTrainedModel, tokens: Tokens, mask: Tokens | None = None) -> Logits:
    attention_mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        result = model(torch.tensor(tokens), attention_mask=attention_mask).logits
    return np.asarray(result.numpy())


def _export(folder: Path, student: Student, preset: str) -> Path:
    write_onnx(student, preset, folder, threads=1)
    return folder


@pytest.fixture(scope="module")
def float32_folder(family_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each trained model as float32 ONNX."""
    return _export(tmp_path_factory.mktemp("onnx"), Student.teacher(Checkpoint(family_folder)), "F32")


@pytest.fixture(scope="module")
def reference(family_folder: Path) -> PreTrainedModel:
    """The same model in transformers."""
    return _reference(family_folder)


def test_long_prompts(float32_folder: Path, reference: PreTrainedModel, heldout_tokens: Tokens) -> None:
    session = Session(float32_folder)
    for first in (0, len(heldout_tokens) // 2):
        tokens = heldout_tokens[None, first : first + 512]
        assert np.abs(session.feed(tokens, np.ones_like(tokens)) - _logits(reference, tokens)).max() < _EXACT


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(
    float32_folder: Path, reference: PreTrainedModel, heldout_tokens: Tokens, side: str
) -> None:
    """A row gives the logits it gives alone, in the prompt and in the steps after it."""
    rows = [heldout_tokens[100:120], heldout_tokens[700:707]]
    width, steps = 20, heldout_tokens[None, 900:903].repeat(2, axis=0)
    tokens, mask = padded(rows, side)
    session = Session(float32_folder)
    prompt_logits = session.feed(tokens, mask)
    for step in range(3):
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        last_logits = session.feed(steps[:, step : step + 1], mask, cached=True)
    for row, values in enumerate(rows):
        used = prompt_logits[row, width - len(values) :] if side == "left" else prompt_logits[row, : len(values)]
        assert np.abs(used - _logits(reference, values[None])[0]).max() < _EXACT
        whole = np.concatenate([values, steps[row]])[None]
        assert np.abs(last_logits[row, -1] - _logits(reference, whole)[0, -1]).max() < _EXACT


def test_logits_are_those_of_the_wanted_positions(float32_folder: Path, heldout_tokens: Tokens) -> None:
    """Of the last one, if the graph is not told; nobody wants more than there are."""
    tokens = heldout_tokens[None, 300:340].reshape(2, 20)
    mask, session = np.ones_like(tokens), Session(float32_folder)
    of_all = session.feed(tokens, mask)
    for kept, n_positions in ((None, 1), (1, 1), (3, 3), (20, 20), (21, 20)):
        found = session.feed(tokens, mask, kept=kept)
        assert found.shape == (2, n_positions, of_all.shape[-1])
        assert np.abs(found - of_all[:, -n_positions:]).max() < _EXACT


def test_padding_behind_a_row_does_not_count(float32_folder: Path, heldout_tokens: Tokens) -> None:
    """The last position is that of the row's last token; a row of one token gives its logits at each position."""
    rows = [heldout_tokens[100:120], heldout_tokens[700:707], heldout_tokens[800:801]]
    tokens, mask = padded(rows, "right")
    session = Session(float32_folder)
    of_all = session.feed(tokens, mask)
    for kept in (1, 3):
        found = session.feed(tokens, mask, kept=kept)
        for row, values in enumerate(rows):
            places = np.maximum(np.arange(len(values) - kept, len(values)), 0)
            assert np.abs(found[row] - of_all[row, places]).max() < _EXACT


def test_prompt_in_chunks(float32_folder: Path, reference: PreTrainedModel, heldout_tokens: Tokens) -> None:
    tokens = heldout_tokens[None, :300]
    session = Session(float32_folder)
    pieces = [
        session.feed(tokens[:, first:last], np.ones((1, last), np.int64), cached=first > 0)
        for first, last in ((0, 128), (128, 129), (129, 300))
    ]
    assert np.abs(np.concatenate(pieces, axis=1) - _logits(reference, tokens)).max() < _EXACT


def test_pruned_student(
    family_folder: Path, tmp_path: Path, reference: PreTrainedModel, heldout_tokens: Tokens
) -> None:
    """Other experts in every layer, fewer of them, and fewer than top-k in the last case."""
    source = Checkpoint(family_folder)
    for n_experts in (5, 1):
        kept = tuple(tuple((7 * layer + 3 * i) % 8 for i in range(n_experts)) for layer in range(source.spec.n_layers))
        student = Student(source, ExpertMap.keeping(source.spec.n_experts, kept))
        session = Session(_export(tmp_path / str(n_experts), student, "F32"))
        tokens = heldout_tokens[None, 2000:2200]
        expected = _logits(_pruned_reference(family_folder, reference, kept), tokens)
        assert np.abs(session.feed(tokens, np.ones_like(tokens)) - expected).max() < _EXACT


def _pruned_reference(folder: Path, model: PreTrainedModel, kept: tuple[tuple[int, ...], ...]) -> PreTrainedModel:
    """A stock model with fewer experts, given the rows of those that are kept."""
    config = AutoConfig.from_pretrained(folder)
    config.num_experts = config.num_local_experts = len(kept[0])
    config.num_experts_per_tok = min(config.num_experts_per_tok, len(kept[0]))
    tensors = dict(model.state_dict())
    for layer, experts in enumerate(kept):
        for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            name = f"model.layers.{layer}.mlp.{part}"
            tensors[name] = tensors[name][list(experts)]
    pruned = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    pruned.load_state_dict(tensors)
    return pruned


@pytest.fixture(scope="module")
def q4_0_folder(family_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each trained model as Q4_0 ONNX."""
    return _export(tmp_path_factory.mktemp("onnx"), Student.teacher(Checkpoint(family_folder)), "Q4_0")


@pytest.fixture(scope="module")
def dequantized_reference(family_folder: Path) -> PreTrainedModel:
    """transformers with the values that the Q4_0 preset stores, by gguf-py's quantizer, which is not ours."""
    model = _reference(family_folder)
    for name, values in model.named_parameters():
        if "norm" in name or "mlp.gate." in name:
            continue
        kind = gguf.GGMLQuantizationType.Q8_0 if name in _EMBEDDINGS else gguf.GGMLQuantizationType.Q4_0
        stored = gguf.quants.dequantize(gguf.quants.quantize(values.detach().numpy(), kind), kind)
        values.data = torch.from_numpy(stored)
    return model


def test_q4_0_computes_with_the_dequantized_weights(
    family_folder: Path, q4_0_folder: Path, dequantized_reference: PreTrainedModel, heldout_tokens: Tokens
) -> None:
    """With float32 inputs all but the head is exact; int8 inputs cost what the last assertions say, and no more."""
    tokens = heldout_tokens[None, 512:1024]
    expected = _logits(dequantized_reference, tokens)
    spec = open_source(family_folder).spec
    model = build_model(plan_tensors(spec, "Q4_0", inputs="float32"))
    int8_head = Session(q4_0_folder, model).feed(tokens, np.ones_like(tokens))
    assert np.abs(int8_head - expected).max() < _INT8_HEAD
    assert _divergence(expected, int8_head) < 1e-4
    (head,) = (node for node in model.graph.node if node.output[0] == "logits")
    (accuracy_level,) = (attribute for attribute in head.attribute if attribute.name == "accuracy_level")
    accuracy_level.i = 1  # float32 inputs
    exact = Session(q4_0_folder, model).feed(tokens, np.ones_like(tokens))
    assert np.abs(exact - expected).max() < _EXACT
    shipped = Session(q4_0_folder).feed(tokens, np.ones_like(tokens))
    assert _divergence(expected, shipped) < _INT8_DIVERGENCE


def _divergence(expected: Logits, found: Logits) -> float:
    """Mean Kullback-Leibler divergence, nats."""
    log_p, log_q = (torch.log_softmax(torch.tensor(logits), -1) for logits in (expected, found))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_untied_head(tmp_path: Path, toy_checkpoint: Callable[..., Path], heldout_tokens: Tokens) -> None:
    """A checkpoint with a head of its own; in both presets it is not the embedding."""
    folder = _untie(toy_checkpoint(tmp_path, n_layers=1, model="coarse"))
    tokens = heldout_tokens[None, :64]
    expected = _logits(_reference(folder), tokens)
    student = Student.teacher(Checkpoint(folder))
    assert not student.spec.tied_embeddings
    for preset, tolerance in (("F32", _EXACT), ("Q4_0", 3.0)):
        session = Session(_export(tmp_path / preset, student, preset))
        logits = session.feed(tokens, np.ones_like(tokens))
        assert np.abs(logits - expected).max() < tolerance


def _untie(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, dims=0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = (folder / "config.json").read_text(encoding="utf-8")
    assert '"tie_word_embeddings": true' in config
    (folder / "config.json").write_text(config.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    return folder


def test_the_weights_are_read_from_the_data_file(float32_folder: Path) -> None:
    """The graph itself is small: nothing of the weights is inside."""
    assert (float32_folder / MODEL_FILE).stat().st_size < 50_000 < (float32_folder / DATA_FILE).stat().st_size
