"""Settings of a checkpoint as they reach the streamed model, both containers and the saved student, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from compressors.calibration.splits import read_splits
from compressors.model.description.spec import MoeSize
from compressors.model.errors import BudgetError, InputError, UnsupportedError
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.sources.gguf_settings import gguf_setting_symptoms
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from exporter.planning.job import Flags
from exporter.planning.planner import TextCounts, choose_recipe
from exporter.planning.recipe import Recipe
from exporter.publishing.deviations import find_deviations
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.hf_checkpoint import write_checkpoint
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.layout import MODEL_FILE, plan_tensors
from exporter.writing.onnx.writer import write_onnx
from tests.altered import altered
from tests.exporter.against_transformers import SAME, divergence, log_probs
from validate.files.folder_settings import folder_setting_symptoms
from validate.files.graph_settings import graph_setting_symptoms
from validate.runtimes.backend import Backend
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.runtimes.torch import TorchBackend

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def toy(toy_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Two layers of the bundled model, whose head is tied."""
    return toy_checkpoint(tmp_path)


def _change(folder: Path, **settings: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def _change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _transformers(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model


def _runtimes(student: Student, folder: Path, n_ctx: int) -> list[Backend]:
    write_gguf(student, "F32", folder / "model.gguf", name="toy", threads=1)
    write_onnx(student, "F32", folder / "onnx", threads=1)
    return [
        LlamaCppBackend(folder / "model.gguf", n_ctx=n_ctx, kv_type="f32", threads=1),
        OnnxRuntimeBackend(folder / "onnx", threads=1),
    ]


def test_a_head_of_its_own_goes_before_tie_word_embeddings(
    toy: Path, tmp_path: Path, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors[_HEAD] = tensors[_EMBEDDING].flip(0).contiguous()

    student = Student.teacher(open_source(_change_tensors(toy, add_head)))
    assert not student.spec.tied_embeddings
    tokens_BT = heldout_tokens[:128].reshape(2, 64)
    expected = log_probs(_transformers(toy), tokens_BT)
    for backend in (TorchBackend(student), *_runtimes(student, tmp_path, n_ctx=64)):
        assert divergence(expected, backend, tokens_BT) < SAME, backend.runtime
    write_checkpoint(student, tmp_path / "student")
    assert json.loads((tmp_path / "student" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.allclose(log_probs(_transformers(tmp_path / "student"), tokens_BT), expected, atol=1e-5)


def test_a_head_that_equals_the_embedding_stays_tied(toy: Path) -> None:
    n_parameters = open_source(toy).spec.parameters
    for widened in (False, True):  # the same values in another dtype are the same head

        def add_head(tensors: dict[str, torch.Tensor], widened: bool = widened) -> None:
            tensors[_HEAD] = tensors[_EMBEDDING].float() if widened else tensors[_EMBEDDING].clone()

        spec = open_source(_change_tensors(toy, add_head)).spec
        assert spec.tied_embeddings
        assert spec.parameters == n_parameters


def test_heads_that_transformers_would_invent_or_move_are_refused(toy: Path) -> None:
    def rename_embedding(tensors: dict[str, torch.Tensor]) -> None:
        tensors[_HEAD] = tensors.pop(_EMBEDDING)

    def cut_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors[_EMBEDDING] = tensors[_HEAD]
        tensors[_HEAD] = tensors[_HEAD][:100].clone()

    with pytest.raises(InputError, match=r"without lm_head\.weight, and tie_word_embeddings is not true"):
        open_source(_change(toy, tie_word_embeddings=False))
    _change(toy, tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"only lm_head\.weight is there"):
        open_source(_change_tensors(toy, rename_embedding))
    with pytest.raises(InputError, match=r"lm_head\.weight has shape \[100, 256\]"):
        open_source(_change_tensors(toy, cut_head))


def test_a_window_becomes_the_context_of_both_files(
    toy_checkpoint: Callable[..., Path], tmp_path: Path, heldout_tokens: npt.NDArray[np.int64]
) -> None:
    folder = _change(toy_checkpoint(tmp_path, model="coarse"), sliding_window=96)
    checkpoint = open_source(folder)
    student = Student.teacher(checkpoint)
    tokens_BT = heldout_tokens[:192].reshape(2, 96)
    expected = log_probs(_transformers(folder), tokens_BT)
    for backend in _runtimes(student, tmp_path, n_ctx=96):
        assert divergence(expected, backend, tokens_BT) < SAME, backend.runtime
    write_client_files(student, tmp_path / "onnx")
    written = {
        name: json.loads((tmp_path / "onnx" / name).read_text()) for name in ("config.json", "genai_config.json")
    }
    assert (written["config.json"]["max_position_embeddings"], written["config.json"]["sliding_window"]) == (96, None)
    assert written["genai_config.json"]["model"]["context_length"] == 96
    file, graph = GgufFile(tmp_path / "model.gguf"), tmp_path / "onnx" / MODEL_FILE
    assert file.metadata["llama.context_length"] == 96
    assert not gguf_setting_symptoms(file.metadata, checkpoint.spec)
    assert not graph_setting_symptoms(graph, checkpoint.spec)
    assert not folder_setting_symptoms(graph, checkpoint, checkpoint.spec)
    named = find_deviations(checkpoint, ("gguf", "onnx"), "toy")
    assert [entry.artifact for entry in named if "sliding_window = 96" in entry.what] == ["gguf", "onnx"]


def test_scalings_that_depend_on_the_length_of_a_text_are_named(
    toy_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """For llama.cpp, test_rope_in_runtimes measures them; ONNX Runtime chooses as transformers does."""
    folder = toy_checkpoint(tmp_path, model="coarse")
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "original_max_position_embeddings": 512}
    named = find_deviations(
        open_source(_change(folder, rope_scaling={"type": "longrope", **factors})), ("gguf", "onnx"), "toy"
    )
    assert [entry.artifact for entry in named if "above 512 tokens" in entry.what] == ["gguf"]
    named = find_deviations(
        open_source(_change(folder, rope_scaling={"type": "dynamic", "factor": 2.0})), ("gguf", "onnx"), "toy"
    )
    assert sum("written for the 2,048 tokens" in entry.what for entry in named) == 2
    assert not find_deviations(open_source(_change(folder, rope_scaling=None)), ("onnx",), "toy")


def _mixtral(folder: Path, head_dim: int) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        num_local_experts=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("head_dim", [16, 48, 80])
def test_heads_of_sixteens_run_in_both_runtimes(tmp_path: Path, head_dim: int) -> None:
    folder = _mixtral(tmp_path / "model", head_dim)
    tokens_BT = np.arange(64).reshape(2, 32)
    expected = log_probs(_transformers(folder), tokens_BT)
    write_onnx(Student.teacher(open_source(folder)), "F32", tmp_path / "onnx", threads=1)
    assert divergence(expected, OnnxRuntimeBackend(tmp_path / "onnx", threads=1), tokens_BT) < SAME


@pytest.mark.parametrize("head_dim", [8, 24, 40, 100])
def test_other_heads_are_refused_before_any_work(tmp_path: Path, head_dim: int) -> None:
    spec = open_source(_mixtral(tmp_path / "model", head_dim)).spec
    with pytest.raises(UnsupportedError, match=f"this model's have {head_dim}: .* use --formats gguf"):
        plan_tensors(spec, "F32")


def _plan(checkpoint: Source, texts: tuple[Path, Path], budget: int, **arguments: Any) -> Recipe:
    job = Flags(budget=f"{budget}B", threads=1, budget_kind="file", **arguments).job()
    counts = TextCounts(calibration=500, selection=60, heldout_files=2)
    return choose_recipe(job, checkpoint, "toy", read_splits(*texts), counts, 8_000_000_000)[0]


def test_rows_that_few_blocks_fit_take_the_types_that_do(toy: Path, small_texts: tuple[Path, Path]) -> None:
    """Experts of width 48: GGUF has 16 bits for such rows, ONNX blocks of 16."""
    checkpoint = open_source(toy)
    checkpoint.spec = checkpoint.spec.with_sizes([MoeSize(32, 48)] * 2)
    recipe = _plan(checkpoint, small_texts, 5_000_000, formats="gguf,onnx")
    types, encodings = recipe.file("gguf").tensors, recipe.file("onnx").tensors
    assert {types[f"blk.{layer}.ffn_down_exps.weight"] for layer in range(2)} == {"BF16"}
    assert "BF16" not in {types[f"blk.{layer}.ffn_up_exps.weight"] for layer in range(2)}
    assert {encodings[f"layers.{layer}.experts"] for layer in range(2)} <= {"4@16", "8@16"}
    assert _plan(checkpoint, small_texts, 20_000_000, formats="onnx", quant="Q4_0").file("onnx").mix == "F32"
    with pytest.raises(BudgetError, match=r"smallest .* needs"):
        _plan(checkpoint, small_texts, 100_000, formats="gguf,onnx")
    assert _plan(checkpoint, small_texts, 12_000_000, formats="gguf", quant="Q4_0").file("gguf").mix == "Q4_0"


def test_a_reason_that_no_type_can_mend_is_the_message(toy: Path, small_texts: tuple[Path, Path]) -> None:
    checkpoint = open_source(toy)
    checkpoint.spec = altered(checkpoint.spec, normalizes=False)
    with pytest.raises(UnsupportedError, match="always normalises"):
        _plan(checkpoint, small_texts, 100_000, formats="gguf")
