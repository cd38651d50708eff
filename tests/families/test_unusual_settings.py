"""Settings that few models have: they are refused, or change nothing where transformers ignores them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from compressors.model.config.config_check import check_against_transformers
from compressors.model.config.reading import read_spec
from compressors.model.description.gguf_rope import gguf_rope_of
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refusal
from exporter.writing.gguf.layout import plan_tensors
from tests.families.checkpoints import spell_as_the_hub
from tests.families.rows import COMMON, ROWS

_RECURRENT, _ATTENDING = "linear_attention", "full_attention"
_PLAIN = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", _ATTENDING)}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
}

_WIDE = {index: {"head_dim": 32, "num_key_value_heads": 1} for index in ("01", "3")}


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
        ("gemma4_text", {"layer_types": [_ATTENDING] * 4}, "this model has only one kind of them"),
        ("gemma4_text", {"rope_parameters": _PLAIN}, "those of this model are of the type default"),
        ("dots1", {"num_key_value_heads": 2}, "keys and values for each of the 4 heads; this model has 2"),
        ("dots1", {"max_window_layers": 2, "sliding_window": 16}, "graph has no windows, and a layer of this model"),
        ("exaone_moe", {"rope_parameters": _LONGROPE}, "graph has one list of rotary factors"),
        ("exaone_moe", {"mlp_layer_types": ["sparse", "dense"] * 2}, "layer 1 of this model has none"),
        ("qwen3_next", {"linear_conv_kernel_dim": 1}, "graph needs a convolution over two tokens or more"),
        ("qwen3_5_moe_text", {"linear_conv_kernel_dim": 1}, "graph needs a convolution over two tokens or more"),
        ("lfm2_moe", {"conv_L_cache": 1}, "graph needs a convolution over two tokens or more"),
        ("lfm2_moe", {"layer_types": [_ATTENDING] * 4}, "graph needs a layer with a convolution"),
        ("lfm2_moe", {"use_expert_bias": False}, "graph needs a bias for the choice of experts"),
        ("lfm2_moe", {"norm_topk_prob": False}, "graph always normalises the weights of the chosen experts"),
        (
            "lfm2_moe",
            {"routed_scaling_factor": 2.5},
            "does not multiply weights by routed_scaling_factor",
        ),
        ("lfm2_moe", {"head_dim": 32}, "queries as wide as the hidden size; this model has 4 heads of 32 at hidden"),
        ("granitemoehybrid", {"mamba_expand": 4, "mamba_d_head": 32}, "heads of Mamba-2 that are twice as wide as the"),
        ("granitemoehybrid", {"mamba_conv_bias": False}, "graph adds a bias behind Mamba-2's convolution"),
        ("granitemoehybrid", {"mamba_d_conv": 1}, "graph needs a convolution over two tokens or more"),
        ("granitemoehybrid", {"layer_types": ["attention"] * 4}, "graph needs a layer of Mamba-2, and this model has"),
        ("nemotron_h", {"use_conv_bias": False}, "graph adds a bias behind Mamba-2's convolution"),
        ("nemotron_h", {"hybrid_override_pattern": "ME*-E"}, "a block of this model has a dense feed-forward"),
        ("nemotron_h", {"hybrid_override_pattern": "*EE*E"}, "graph needs a layer of Mamba-2, and this model has none"),
        ("ernie4_5_moe", {"moe_layer_end_index": 1}, "layer 2 of this model has none"),
        ("ernie4_5_moe", {"moe_norm_min": 0.1}, "graph divides weights by their sum from 6.10352e-05 on, this model"),
    ],
)
def test_llama_cpp_would_not_load_it(tmp_path: Path, family: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        plan_tensors(_read(tmp_path, family, **changes), "F32")


def test_onnx_needs_the_same(tmp_path: Path) -> None:
    spec = _read(tmp_path, "qwen3_next")
    without_attention = replace(spec, layers=spec.layers[::2])
    assert "need a layer that attends, and this model has none" in str(refusal(without_attention, Container.ONNX))
    short = _read(tmp_path, "qwen3_next", linear_conv_kernel_dim=1)
    assert "covers one token" in str(refusal(short, Container.ONNX))


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
    ("family", "kinds", "attending"),
    [
        ("lfm2_moe", ..., "full_attention"),
        ("lfm2_moe", ["conv"] * 4, "full_attention"),
        ("granitemoehybrid", ..., "attention"),
        ("granitemoehybrid", ["mamba"] * 4, "attention"),
    ],
)
def test_some_layer_must_attend_beside_others(tmp_path: Path, family: str, kinds: Any, attending: str) -> None:
    with pytest.raises(InputError, match=rf"config\.json: layer_types must name layers of {attending}"):
        _read(tmp_path, family, layer_types=kinds)


@pytest.mark.parametrize("pattern", ["MEMEE", "ME+ME", 5])
def test_the_pattern_names_blocks_of_which_one_attends(tmp_path: Path, pattern: Any) -> None:
    with pytest.raises(InputError, match=r"config\.json: hybrid_override_pattern is .*; it must name a kind for each"):
        _read(tmp_path, "nemotron_h", hybrid_override_pattern=pattern)


def test_dense_blocks_beside_blocks_with_experts_are_written_as_onnx(tmp_path: Path) -> None:
    spec = _read(tmp_path, "nemotron_h", hybrid_override_pattern="ME*-E")
    assert [layer.feed_forward is None for layer in spec.layers] == [True, False, True, False, False]
    assert refusal(spec, Container.ONNX) is None


def test_heads_of_mamba_2_must_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mamba_n_heads 8 times mamba_d_head 24 must be mamba_expand times hidden"):
        _read(tmp_path, "granitemoehybrid", mamba_d_head=24)
    with pytest.raises(InputError, match="mamba_n_heads is 8, which mamba_n_groups 3 does not divide"):
        _read(tmp_path, "granitemoehybrid", mamba_n_groups=3)


def test_attention_beside_mamba_2_turns_if_it_is_told_to(tmp_path: Path) -> None:
    spec = _read(tmp_path, "granitemoehybrid", position_embedding_type="rope", rope_theta=5e5)
    assert spec.rope is not None and spec.rope.theta == 5e5
    assert gguf_rope_of(spec).keys["rope.scaling.finetuned"] is True
    spec = _read(tmp_path, "granitemoehybrid", position_embedding_type=None)
    assert spec.rope is None and gguf_rope_of(spec).keys == {"rope.scaling.finetuned": False}


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("nemotron_h", {"hybrid_override_pattern": "M*-M-"}, "hybrid_override_pattern leaves none of the 5 layers"),
        ("ernie4_5_moe", {"moe_layer_start_index": 3}, "moe_layer_end_index leaves none of the 3 layers"),
        ("lfm2_moe", {"num_dense_layers": 4}, "num_dense_layers leaves none of the 4 layers"),
    ],
)
def test_some_layer_must_have_experts(tmp_path: Path, family: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
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
        ("ernie4_5_moe", {"moe_layer_end_index": 2}),
        ("hunyuan_v1_moe", {"moe_topk": 2, "head_dim": 128, "moe_intermediate_size": ..., "num_shared_expert": ...}),
        ("granitemoehybrid", {"layer_types": [_RECURRENT, _ATTENDING] * 2, "mamba_d_head": "auto"}),
        ("granitemoehybrid", {"time_step_limit": [0.0, {"__float__": "Infinity"}], "mamba_chunk_size": 64}),
        (
            "nemotron_h",
            {"hybrid_override_pattern": ..., "layers_block_type": ["mamba", "moe", "attention", "mamba", "moe"]},
        ),
        ("nemotron_h", {"num_hidden_layers": 7, "time_step_min": 0.01, "intermediate_size": 3, "expand": 3}),
        ("nemotron_h", {"n_shared_experts": 2, "chunk_size": 64, "num_nextn_predict_layers": 1}),
        ("lfm2_moe", {"num_local_experts": 4, "tie_embedding": ..., "num_dense_layers": 1}),
        ("minimax_m2", {"rotary_dim": ..., "partial_rotary_factor": 0.5}),
        ("ernie4_5_moe", {"num_experts": 8, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 1}),
        ("gemma4_text", {"per_layer_config": _WIDE, "global_head_dim": 64, "num_global_key_value_heads": ...}),
        ("gemma4_text", {"rope_parameters": ..., "use_bidirectional_attention": "vision"}),
    ],
)
def test_what_transformers_ignores_changes_nothing(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    (tmp_path / "plain").mkdir()
    assert _read(tmp_path, family, **changes) == _read(tmp_path / "plain", family)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("ernie4_5_moe", {"sliding_window": 16}, r"sliding_window is 16; .* only with None"),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, r"moe_layer_interval is 2; .* only with 1"),
        ("lfm2_moe", {"conv_bias": True}, r"conv_bias is True; .* only with False"),
        (
            "granitemoehybrid",
            {"time_step_limit": [0.001, float("inf")]},
            "without limits of the steps of Mamba-2's heads",
        ),
        ("granitemoehybrid", {"mamba_proj_bias": True}, r"mamba_proj_bias is True; .* only with False"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, r"mlp_hidden_act is 'silu'; .* only with 'relu2'"),
        ("nemotron_h", {"time_step_limit": [0.001, float("inf")]}, "without limits of the steps of Mamba-2's heads"),
        ("minimax_m2", {"sliding_window": 16}, r"sliding_window is 16; .* only with None"),
        ("minimax_m2", {"use_qk_norm": False}, r"use_qk_norm is False; .* only with True"),
        (
            "hunyuan_v1_moe",
            {"moe_topk": [2, 2, 1]},
            "moe_topk is .*; it must be one number, or the",
        ),
        ("hunyuan_v1_moe", {"moe_intermediate_size": [32, 32, 16]}, "goes by 32 in each layer"),
        ("hunyuan_v1_moe", {"num_shared_expert": 2}, "goes by 1 in each layer"),
        ("gemma4_text", {"enable_moe_block": False}, "it is a dense model"),
        ("gemma4_text", {"hidden_size_per_layer_input": ...}, "hidden_size_per_layer_input is not 0"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2; .* only with 0"),
        ("gemma4_text", {"layer_types": ["sliding_attention"] * 4}, "gives the last layer a window"),
        ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 32}}}, "for all layers of full_attention alike"),
        ("minimax_m2", {"rotary_dim": 15}, "partial_rotary_factor is .*; of heads of 32 values that is not a number"),
    ],
)
def test_it_is_not_supported(tmp_path: Path, family: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        _read(tmp_path, family, **changes)


def test_qwen2_moe_has_no_layers_with_a_window(tmp_path: Path) -> None:
    """By default it has none, and then transformers cannot run a layer that should have one."""
    with pytest.raises(UnsupportedError, match="layer_types must name full_attention for each of the 3 layers"):
        _read(tmp_path, "qwen2_moe", layer_types=["sliding_attention"] * 3)
