"""Settings that few models have: they are refused, or change nothing where transformers ignores them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from compressors.model.config.config_check import check_against_transformers
from compressors.model.config.reading import read_spec
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from exporter.writing.gguf.layout import plan_tensors
from tests.families.checkpoints import spell_as_the_hub
from tests.families.rows import COMMON, ROWS

_RECURRENT, _ATTENDING = "linear_attention", "full_attention"
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
}


def _read(folder: Path, family: str, **changes: Any) -> ModelSpec:
    """The description of a row's model with other settings in its ``config.json``; with ``...`` they are absent."""
    row = ROWS[family]
    AutoConfig.for_model(family, **{**COMMON, **row.sizes}).save_pretrained(folder)
    path = folder / "config.json"
    spell_as_the_hub(path, row)
    config = json.loads(path.read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    path.write_text(json.dumps(config))
    spec = read_spec(folder)
    check_against_transformers(config, path, spec)
    return spec


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("afmoe", {"mup_enabled": False}, "graph multiplies the embedding by the root of the hidden size, this model"),
        ("afmoe", {"global_attn_every_n_layers": 3}, "graph turns queries and keys in all layers but every 4th"),
        ("qwen2_moe", {"head_dim": 32}, "queries as wide as the hidden size; this model has 4 heads of 32 at hidden"),
        ("gpt_oss", {"layer_types": [_ATTENDING] * 4}, "graph needs a layer with a window"),
        ("dots1", {"num_key_value_heads": 2}, "keys and values for each of the 4 heads; this model has 2"),
        ("dots1", {"max_window_layers": 2, "sliding_window": 16}, "graph has no windows, and a layer of this model"),
        ("exaone_moe", {"rope_parameters": _LONGROPE}, "graph has one list of rotary factors"),
        ("exaone_moe", {"mlp_layer_types": ["sparse", "dense"] * 2}, "layer 1 of this model has none"),
        ("qwen3_next", {"linear_conv_kernel_dim": 1}, "graph needs a convolution over two tokens or more"),
        ("qwen3_5_moe_text", {"linear_conv_kernel_dim": 1}, "graph needs a convolution over two tokens or more"),
    ],
)
def test_llama_cpp_would_not_load_it(tmp_path: Path, family: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        plan_tensors(_read(tmp_path, family, **changes), "F32")


def test_some_layer_must_be_turned(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"none of the 4 layers has a window, so that no layer would know"):
        _read(tmp_path, "exaone_moe", layer_types=[_ATTENDING] * 4)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
@pytest.mark.parametrize(
    "changes",
    [{"layer_types": [_RECURRENT] * 4}, {"full_attention_interval": 5}, {"num_hidden_layers": 1}],
)
def test_some_layer_must_attend(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"config\.json: by layer_types or full_attention_interval none of"):
        _read(tmp_path, family, **changes)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_moe", {"num_local_experts": 4}),
        ("qwen3_next", {"num_local_experts": 4}),
        ("qwen3_5_moe_text", {"num_local_experts": 4}),
        ("afmoe", {"num_expert_groups": 1, "n_group": 1, "load_balance_coeff": 0.001}),
        ("dots1", {"scoring_func": "noaux_tc"}),
        ("exaone_moe", {"layer_types": [*["sliding_attention"] * 3, _ATTENDING], "sliding_window_pattern": "LLLG"}),
        ("exaone_moe", {"is_moe_layer": [False, True, True, True], "topk_method": "noaux_tc"}),
        ("qwen3_next", {"layer_types": [_RECURRENT, _ATTENDING] * 2, "full_attention_interval": None}),
    ],
)
def test_what_transformers_ignores_changes_nothing(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    (tmp_path / "plain").mkdir()
    assert _read(tmp_path, family, **changes) == _read(tmp_path / "plain", family)


def test_qwen2_moe_has_no_layers_with_a_window(tmp_path: Path) -> None:
    """By default it has none, and then transformers cannot run a layer that should have one."""
    with pytest.raises(UnsupportedError, match="layer_types must name full_attention for each of the 3 layers"):
        _read(tmp_path, "qwen2_moe", layer_types=["sliding_attention"] * 3)
