"""``inspect``: figures from headers, against sums over the tensors themselves."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from compressors.model.errors import InputError
from exporter.inspection import describe, description_table


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
    printed = io.StringIO()
    Console(file=printed, width=160).print(description_table(describe(fine_folder)))
    text = printed.getvalue()
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


def test_what_is_odd_about_the_files_is_said(tmp_path: Path, toy_checkpoint: Callable[..., Path]) -> None:
    folder = toy_checkpoint(tmp_path, n_layers=1)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"[bold]": "x.safetensors"}}')
    description = describe(folder)
    (note,) = description["notes"]
    printed = io.StringIO()
    Console(file=printed, width=200).print(description_table(description))
    assert note == "model.safetensors is read, as transformers does, and not model.safetensors.index.json beside it"
    assert note in printed.getvalue()


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        describe(tmp_path)
