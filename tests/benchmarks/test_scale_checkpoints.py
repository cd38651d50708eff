"""The writer of checkpoints of real shape, on small ones: complete, readable, and weights of the promised size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from benchmarks.scale.checkpoints import MODELS, with_layers, write_checkpoint
from compressors.model.config.reading import read_spec
from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.sources.hugging_face.checkpoint import Checkpoint

_SMALL = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8}
_SMALL |= {"intermediate_size": 32, "moe_intermediate_size": 32, "vocab_size": 4096}


@pytest.fixture(params=sorted(MODELS))
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**with_layers(MODELS[request.param], 2), **_SMALL}


def test_the_checkpoint_is_whole_and_in_shards(config: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(config, tmp_path / "model", shard_bytes=200_000)
    checkpoint = Checkpoint(tmp_path / "model")  # checks every tensor's name and shape
    assert len(checkpoint.files) > 3
    assert all(file.stat().st_size < 600_000 for file in checkpoint.files)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == checkpoint.n_bytes == 2 * checkpoint.spec.parameters
    assert {file.name for file in checkpoint.files} == set(index["weight_map"].values())
    assert not (tmp_path / "model.partial").exists()


def test_weights_are_random_and_no_two_experts_alike(config: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(config, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    experts = [checkpoint.expert(Role.EXPERT_UP, layer, expert) for layer in range(2) for expert in range(8)]
    for tensor in experts:
        assert tensor.float().std() == pytest.approx(0.02, rel=0.05)
        assert sum(torch.equal(tensor, other) for other in experts) == 1
    assert torch.equal(checkpoint.tensor(Role.FINAL_NORM), torch.ones(64, dtype=torch.bfloat16))
    # normed values have a mean square of 1, so the logits' variance is the sum of a row's squares
    assert checkpoint.tensor(Role.ROUTER, 1).float().square().sum(1).mean() == pytest.approx(1, rel=0.2)


def test_equal_arguments_give_equal_bytes(config: dict[str, Any], tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_checkpoint(config, tmp_path / name)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_the_published_shapes(tmp_path: Path) -> None:
    """transformers understands the configurations, and they have the published numbers of parameters."""
    parameters = {}
    for name, config in MODELS.items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert AutoConfig.from_pretrained(tmp_path).model_type == config["model_type"]
        parameters[name] = read_spec(tmp_path).parameters
    assert parameters == {"olmoe": 6_919_161_856, "qwen3-30b": 30_532_122_624}


def test_a_folder_that_exists_is_left_alone(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists: choose another folder"):
        write_checkpoint(config, tmp_path)
    assert not list(tmp_path.iterdir())
