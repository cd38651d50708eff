"""Recipes in docs/ work, and have the sizes that the docs say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressors.model.config.reading import read_spec
from compressors.model.description.spec import ModelSpec
from exporter.planning.compression import check_compression, expected_spec
from exporter.planning.recipe import load_recipe
from exporter.writing.gguf.layout import plan_tensors

_DOCS = Path(__file__).parents[3] / "docs"
_RECIPE = _DOCS / "recipes" / "mixtral-8x7b-block-drop-5.yaml"


@pytest.fixture
def mixtral(tmp_path: Path) -> ModelSpec:
    """Mixtral-8x7B."""
    config = {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_spec(tmp_path)


@pytest.mark.parametrize("n_dropped", [0, 5, 8])
def test_the_sizes_of_the_docs_are_those_of_the_plan(mixtral: ModelSpec, n_dropped: int) -> None:
    recipe = load_recipe(_RECIPE)
    check_compression(recipe, mixtral)
    choice = recipe.compress.model_copy(update={"drop_blocks": n_dropped})
    n_bytes = sum(tensor.n_bytes for tensor in plan_tensors(expected_spec(choice, mixtral), recipe.file("gguf").mix))
    row = f"| {n_dropped} | {n_bytes / 1e9:.2f} | {n_bytes / 2**30:.2f} |"
    assert row in (_DOCS / "compression.md").read_text(encoding="utf-8")


def test_the_recipe_drops_what_its_name_says(mixtral: ModelSpec) -> None:
    recipe = load_recipe(_RECIPE)
    assert recipe.compress.drop_blocks == 5
    assert expected_spec(recipe.compress, mixtral).n_layers == 27
    assert recipe.source.identity is None, "it is for anybody's copy of the weights"
