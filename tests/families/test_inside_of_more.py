"""A language model inside a multimodal one, as the hub has Qwen3.5: nested settings, other names, fused experts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from compressors.model.families.config_check import check_against_transformers
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from exporter.writing.hf_checkpoint import write_checkpoint
from tests.families.conftest import logits_of

_EXPERT = re.compile(r"(?P<layer>.*\.experts\.)(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")


@pytest.fixture(scope="module", params=["qwen3_5_moe_text"])
def family(request: pytest.FixtureRequest) -> str:
    """The families of which the hub has larger models."""
    return str(request.param)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in the spelling of the whole model, with its other parts."""
    path = tmp_path_factory.mktemp("whole") / "whole"
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns("generation_config.json"))
    inside = json.loads((folder / "config.json").read_text())
    inside |= {"mtp_num_hidden_layers": 1}
    whole_type = str(inside["model_type"]).removesuffix("_text")
    config: dict[str, Any] = {
        "model_type": whole_type,
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": {key: value for key, value in inside.items() if key != "architectures"},
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32},
        "eos_token_id": [0, 1],
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    others = {"model.visual.blocks.0.norm1.weight": torch.ones(32), "mtp.fc.weight": torch.ones(2, 2)}
    save_file({**dict(_renamed(path)), **others}, path / "model.safetensors")
    return path


def _renamed(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under the hub's names; the experts of a layer are one tensor, or two."""
    stored = load_file(path / "model.safetensors")
    experts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name, tensor in stored.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            yield name.replace("model.", "model.language_model.", 1), tensor
        else:
            of_layer = experts.setdefault(match["layer"].replace("model.", "model.language_model.", 1), {})
            of_layer.setdefault(match["part"], {})[int(match["expert"])] = tensor
    for layer, parts in experts.items():
        gate, up, down = (torch.stack([parts[part][e] for e in sorted(parts[part])]) for part in ("gate", "up", "down"))
        yield f"{layer}gate_up_proj", torch.cat([gate, up], dim=1)
        yield f"{layer}down_proj", down


def test_it_is_read_as_the_language_model_alone(folder: Path, whole: Path) -> None:
    alone, inside = Checkpoint(folder), Checkpoint(whole)
    check_against_transformers(whole, inside.spec)
    assert inside.spec.layers == alone.spec.layers and inside.spec.eos_token_ids == (0, 1)
    assert inside.parts_read_past == ("layers for predicting several tokens at once (MTP)", "the part that sees images")
    assert alone.parts_read_past == ()
    for tensor, layer in alone.spec.places:
        if not tensor.is_per_expert:
            assert torch.equal(inside.tensor(tensor.role, layer), alone.tensor(tensor.role, layer))
        else:
            assert layer is not None
            assert torch.equal(inside.expert(tensor.role, layer, 5), alone.expert(tensor.role, layer, 5))


@torch.no_grad()
def test_stock_transformers_computes_the_same(whole: Path, stock: nn.Module, blocks_BT: torch.Tensor) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    expected = stock(blocks_BT).logits
    assert (loaded(blocks_BT).logits - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_a_student_is_saved_as_a_language_model(whole: Path, blocks_BT: torch.Tensor, tmp_path: Path) -> None:
    """Without some layers, so that its kinds of layers are no longer at an interval."""
    source = Checkpoint(whole)
    kept = tuple((expert,) for expert in (0, 2, 3, 5, 6, 7))
    student = Student(source, ExpertMap(8, tuple(LayerMap(layer, kept) for layer in (0, 1, 3))))
    write_checkpoint(student, tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["model_type"] == source.spec.model_type and config["architectures"] == [source.family.architecture]
    assert config["layer_types"] == ["linear_attention", "full_attention", "full_attention"]
    assert config["eos_token_id"] == [0, 1]
    assert not {"text_config", "vision_config", "full_attention_interval", "mtp_num_hidden_layers"} & config.keys()
    assert Checkpoint(tmp_path / "student").spec == student.spec
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = loaded(blocks_BT).logits.flatten(0, 1)
    assert (logits_of(StreamedModel(student), blocks_BT) - expected).abs().max() < 1e-4 * expected.abs().max()
