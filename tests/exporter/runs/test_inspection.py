"""``inspect``: figures from headers, against sums over the tensors themselves."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import exporter.inspection
from compressors.model.config.reading import read_spec
from compressors.model.errors import InputError
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from exporter.inspection import describe, description_table
from tests.altered import with_dense_layers


def _printed(description: dict[str, Any]) -> str:
    printed = io.StringIO()
    Console(file=printed, width=200).print(description_table(description))
    return printed.getvalue()


def test_what_is_said_of_the_qwen3_moe(fine_folder: Path) -> None:
    description = describe(fine_folder)
    said = {
        "family": "qwen3_moe",
        "architecture": "Qwen3MoeForCausalLM",
        "layers": 6,
        "hidden_size": 256,
        "attention": {"heads": 8, "kv_heads": 4, "head_dim": 32},
        "experts": {"per_layer": 32, "per_token": 4, "width": 128},
        "routing": "softmax over all experts, top 4, weights normalised",
        "vocabulary": 4096,
        "context": 2048,
        "tied_embeddings": True,
        "dtype": "bfloat16",
        "weight_files": 1,
        "gguf_architecture": "qwen3moe",
    }
    assert {key: description[key] for key in said} == said


def test_what_is_said_of_the_mixtral(coarse_folder: Path) -> None:
    description = describe(coarse_folder)
    assert description["experts"] == {"per_layer": 8, "per_token": 2, "width": 512}
    assert (description["gguf_architecture"], description["weight_files"]) == ("llama", 3)


def test_sizes_are_sums_over_the_tensors(family_folder: Path) -> None:
    description = describe(family_folder)
    tensors = {name: t for file in family_folder.glob("*.safetensors") for name, t in load_file(file).items()}
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    n_elements = sum(tensor.numel() for tensor in tensors.values())
    assert description["parameters"] == n_elements
    assert description["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert description["expert_bytes"] == sum(tensor.nbytes for tensor in experts.values())
    count = description["experts"]
    idle = sum(tensor.numel() for tensor in experts.values()) * (1 - count["per_token"] / count["per_layer"])
    assert description["active_parameters"] == n_elements - idle


def test_routing_that_is_not_normalised_is_said_so(tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> None:
    folder = toy_checkpoint(tmp_path, n_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))
    assert describe(folder)["routing"] == "softmax over all experts, top 4"


def test_the_description_is_plain_data(family_folder: Path) -> None:
    description = describe(family_folder)
    assert json.loads(json.dumps(description)) == description


def test_the_table_says_what_matters(fine_folder: Path) -> None:
    text = _printed(describe(fine_folder))
    for part in (
        "qwen3_moe",
        # 6 layers of 196608 + 576 + 8192 + 32 x 98304, the embedding's 1048576, a norm; 28 of 32 experts are idle
        "21,155,456 (4,640,384 active per token)",
        "42.3 MB (40.4 MiB) in bfloat16, 89% of it experts",
        "32 per layer, 4 per token, width 128",
        "4 key-value heads of 32",
        "4,096 tokens, embeddings tied",
        "2,048 tokens",
        "architecture qwen3moe",
    ):
        assert part in text, part


def test_layers_are_described_by_kind(fine_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter.inspection, "open_source", Checkpoint)  # not the one that is remembered
    monkeypatch.setattr(Checkpoint, "_check_tensors", lambda _self: None)
    monkeypatch.setattr(
        "compressors.model.sources.hugging_face.checkpoint.read_spec",
        lambda folder: with_dense_layers(read_spec(folder), 2),
    )
    description = describe(fine_folder)
    first, second = description["layer_kinds"]
    assert (first["layers"], first["feed_forward"]) == ([0, 1], "a dense feed-forward of width 64")
    assert (second["layers"], second["feed_forward"]) == ([2, 3, 4, 5], "32 experts of width 128, 4 for each token")
    # an expert has 3 x 128 x 256 values; 28 of 32 are idle in four layers
    assert description["parameters"] - description["active_parameters"] == 4 * 28 * 98304
    assert description["expert_bytes"] == 4 * 32 * 98304 * 2
    printed = _printed(description)
    assert "layers 0-1: grouped-query attention (8 heads, 4 key-value heads of 32); a dense feed-forward" in printed
    assert "layers 2-5: grouped-query attention" in printed
    assert "written as  GGUF, ONNX, saved student" in printed


def test_what_can_be_made_of_a_model_is_said(olmoe_folder: Path) -> None:
    description = describe(olmoe_folder)
    assert description["containers"] == {"gguf": None, "onnx": None, "student": None}
    # 3 layers, 4 key-value heads of 32, a key and a value
    assert description["cache_bytes_per_token"] == {"gguf": 3 * 4 * 32 * 2 * 2, "onnx": 3 * 4 * 32 * 2 * 4}
    printed = _printed(description)
    assert "written as  GGUF, ONNX, saved student" in printed
    assert "as ONNX only: a different number of experts in each layer, layers without experts" in printed
    assert "not possible: a dense student" in printed


def test_parts_that_are_read_past_are_said(tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> None:
    folder = toy_checkpoint(tmp_path, n_layers=2, model="olmoe")
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(16) for layer in range(2)}
    others = {"v_head.summary.weight": torch.ones(1, 256)}
    save_file(load_file(folder / "model.safetensors") | tables | others, folder / "model.safetensors")
    description = describe(folder)
    assert description["parts_read_past"] == [
        "tables of the rotary embedding, which are computed (2 tensors)",
        "heads for other tasks than text (1 tensors)",
    ]
    assert "read past   tables of the rotary embedding" in _printed(description)


def test_what_is_odd_about_the_files_is_said(tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> None:
    folder = toy_checkpoint(tmp_path, n_layers=1)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"[bold]": "x.safetensors"}}')
    description = describe(folder)
    (note,) = description["notes"]
    assert note == "model.safetensors is read, as transformers does, and not model.safetensors.index.json beside it"
    assert note in _printed(description)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        describe(tmp_path)
