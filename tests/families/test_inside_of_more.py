"""A language model inside a multimodal one, as the hub has some: nested settings, other names, fused experts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from compressors.model.config.config_check import check_against_transformers
from compressors.model.config.reading import read_spec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from exporter.writing.hf_checkpoint import write_checkpoint
from tests.families.checkpoints import write_inside_of_more
from tests.families.conftest import logits_of
from tests.float8_checkpoints import all_tensors, blocks, write_float8


@pytest.fixture(scope="module", params=["gemma4_text", "qwen3_5_moe_text"])
def family(request: pytest.FixtureRequest) -> str:
    """The families of which the hub has larger models."""
    return str(request.param)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in the spelling of the whole model, with its other parts."""
    path = tmp_path_factory.mktemp("whole") / "whole"
    write_inside_of_more(folder, path)
    return path


def test_it_is_read_as_the_language_model_alone(folder: Path, whole: Path) -> None:
    alone, inside = Checkpoint(folder), Checkpoint(whole)
    check_against_transformers(inside.config, inside.config_path, inside.spec)
    assert inside.spec.layers == alone.spec.layers and inside.spec.eos_token_ids == (0, 1)
    assert sum(inside.parts_read_past.values()) == 2  # which the whole has beside it
    assert inside.parts_read_past.keys() == {part.name for part in inside.family.skipped}
    assert not alone.parts_read_past
    for tensor, layer in alone.spec.places:
        if not tensor.is_per_expert:
            assert torch.equal(inside.tensor(tensor.role, layer), alone.tensor(tensor.role, layer))
        else:
            assert layer is not None
            assert torch.equal(inside.expert(tensor.role, layer, 5), alone.expert(tensor.role, layer, 5))


def test_a_release_in_float8(folder: Path, whole: Path, tmp_path: Path) -> None:
    """It has an own tensor for each expert; the dtype of the weights is a setting of the language model inside."""
    scheme = blocks((48, 40), torch.bfloat16, modules_to_not_convert=["lm_head", "model.visual.merger"])
    write_float8(folder, tmp_path / "alone", tmp_path / "plain", scheme)
    inside = Path(shutil.copytree(whole, tmp_path / "inside"))
    config = json.loads((whole / "config.json").read_text())
    assert "dtype" not in config and config["text_config"]["dtype"] == "float32"
    (inside / "config.json").write_text(json.dumps({**config, "quantization_config": scheme.settings}))
    tensors = load_file(tmp_path / "alone" / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, inside / "model.safetensors", metadata={"format": "pt"})
    found, wanted = Checkpoint(inside), Checkpoint(tmp_path / "plain")
    assert (found.n_bytes, found.dtype, found.stored_as) == (wanted.n_bytes, torch.float32, "FP8, block 48x40")
    of_release = all_tensors(found)
    assert all(torch.equal(of_release[place], tensor) for place, tensor in all_tensors(wanted).items())
    write_checkpoint(Student.teacher(found), tmp_path / "student")
    assert "quantization_config" not in json.loads((tmp_path / "student" / "config.json").read_text())


def test_a_release_in_float8_with_a_tensor_missing_is_not_called_unquantized(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    inside = write_float8(whole, tmp_path / "inside")
    tensors = load_file(inside / "model.safetensors")
    (missing,) = (name for name in tensors if re.search(r"\.1\..*experts\.down_proj_scale_inv", name))
    del tensors[missing]
    save_file(tensors, inside / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"experts\.down_proj is float8, but its scales, .*, are in none"):
        Checkpoint(inside)


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
    kinds = json.loads((whole / "config.json").read_text())["text_config"].get("layer_types", _BY_INTERVAL)
    write_checkpoint(student, tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["model_type"] == source.spec.model_type and config["architectures"] == [source.family.architecture]
    assert config["layer_types"] == [kinds[0], kinds[1], kinds[3]]
    assert config["eos_token_id"] == [0, 1]
    assert not {"text_config", "vision_config", "full_attention_interval", "mtp_num_hidden_layers"} & config.keys()
    assert Checkpoint(tmp_path / "student").spec == student.spec
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = loaded(blocks_BT).logits.flatten(0, 1)
    assert (logits_of(StreamedModel(student), blocks_BT) - expected).abs().max() < 1e-4 * expected.abs().max()


_BY_INTERVAL = ["linear_attention", "full_attention"] * 2
"""The kinds of layers of the model whose file has no list of them."""


@pytest.mark.parametrize("inner_type", ["qwen3_moe", "mixtral"])
def test_the_language_model_must_be_of_the_family(whole: Path, tmp_path: Path, inner_type: str) -> None:
    """transformers would make a model of the other family, and fill it with random numbers."""
    config = json.loads((whole / "config.json").read_text())
    config["text_config"]["model_type"] = inner_type
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = f"text_config.model_type is {inner_type}, but the language model inside a {config['model_type']} is"
    with pytest.raises(UnsupportedError, match=re.escape(said)):
        read_spec(tmp_path)
