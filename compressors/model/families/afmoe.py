"""AFMoE (Trinity): norms in front of and behind each block, gates on attention, and windows in most layers.

Layers without a window are not turned. In llama.cpp's graph that is every fourth layer, whatever a file says; other
models, and those without ``mup_enabled``, are refused for GGUF.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue
from compressors.model.description.feed_forward import Routed, Shared
from compressors.model.description.mixers import OutputGate, QkNorm
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing, Score
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import GgufTensor, TensorSpec
from compressors.model.families.shared import expert_layers, from_gguf, llama_cpp, parts, windowed, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 200192,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 32,
    "num_dense_layers": 1,
    "num_attention_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "num_shared_experts": 2,
    "route_scale": 1.0,
    "global_attn_every_n_layers": 4,
    "sliding_window": 1024,
}
_SPELLING = expert_layers.Spelling("num_experts", alias=None, n_shared="num_shared_experts", scale="route_scale")
_LAYER, _BLK = "model.layers.{layer}.", "blk.{layer}."


def _norm(role: Role, name: str, gguf: str) -> TensorSpec:
    return parts.norm(role, f"{_LAYER}{name}.weight", ("D",), f"{_BLK}{gguf}.weight")


_GATE = TensorSpec(
    Role.ATTENTION_GATE,
    f"{_LAYER}self_attn.gate_proj.weight",
    ("Q", "D"),
    GgufTensor(f"{_BLK}attn_gate.weight"),
    shares_input_of=Role.QUERY,
)
_OF_ATTENTION = (
    _norm(Role.ATTENTION_NORM, "input_layernorm", "attn_norm"),
    *parts.attention_matrices(),
    *parts.qk_norm_tensors(QkNorm.PER_HEAD),
    _GATE,
    _norm(Role.ATTENTION_OUTPUT_NORM, "post_attention_layernorm", "post_attention_norm"),
    _norm(Role.MOE_NORM, "pre_mlp_layernorm", "ffn_norm"),
    _norm(Role.MOE_OUTPUT_NORM, "post_mlp_layernorm", "post_ffw_norm"),
)
_ROUTER = parts.router_tensor("mlp.router.gate.weight", module="mlp.router.gate.weight")
_OF_EXPERTS = expert_layers.tensors(parts.selection_bias_tensor("mlp.expert_bias"), _ROUTER)
_STILL = 4
"""Every so many layers llama.cpp's graph has one that is not turned."""


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS, nullable=("num_key_value_heads",))
    settings.require("attention_bias", False)
    settings.refuse_what_no_family_can_do()
    attention = replace(parts.attention(settings, QkNorm.PER_HEAD, has_kinds=True), output_gate=OutputGate.OWN)
    mixers = windowed.mixers(settings, attention, "global_attn_every_n_layers")
    are_dense = expert_layers.leading_dense(settings, "num_dense_layers")
    layers = expert_layers.layers(
        settings, mixers, _OF_ATTENTION, _experts(settings), _OF_EXPERTS, are_dense, "num_dense_layers"
    )
    scales = settings.flag("mup_enabled", default=False)
    return parts.model(settings, layers, embedding_scale=math.sqrt(settings.count("hidden_size")) if scales else 1.0)


def _experts(settings: FamilySettings) -> Routed:
    settings.require("hidden_act", "silu", "swish")
    settings.require("score_func", "sigmoid")
    settings.require("route_norm", True)  # transformers' class does not read it
    for key in ("n_group", "topk_group", "num_expert_groups", "num_limited_groups"):
        settings.require(key, 1)  # transformers' class has no groups
    n_experts, width = settings.count("num_experts"), settings.count("moe_intermediate_size")
    routing = Routing(Score.SIGMOID, has_selection_bias=True, epsilon=1e-20, scale=settings.number("route_scale"))
    return parts.routed_in_mlp(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts),
        width=width,
        routing=routing,
        shared=Shared(width * settings.count("num_shared_experts")),
    )


def _settings(spec: ModelSpec) -> ConfigValues:
    of_layers = {
        "layer_types": written_config.attention_kinds(spec),
        "num_dense_layers": parts.n_dense(spec),
        "mup_enabled": spec.embedding_scale != 1.0,
    }
    return expert_layers.settings_beside_attention(spec, _SPELLING, normalizes=None) | of_layers


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    return expert_layers.edited(spec, config, "layer_types", "num_dense_layers", spelling=_SPELLING)


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    return {**llama_cpp.usual_keys(spec), **expert_layers.gguf_keys(spec), **windowed.gguf_keys(spec)}


def _refusal(spec: ModelSpec) -> str | None:
    if spec.embedding_scale == 1.0:
        return "graph multiplies the embedding by the root of the hidden size, this model does not (mup_enabled)"
    are_turned = [layer.mixer.rope is not None for layer in spec.layers]
    if are_turned == [bool((index + 1) % _STILL) for index in range(spec.n_layers)]:
        return None
    return f"graph turns queries and keys in all layers but every {_STILL}th, this model in other ones"


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    """The settings; llama.cpp's graph always multiplies the embedding."""
    return {
        **from_gguf.usual_settings(keys, n_experts=_SPELLING.n_experts, width="moe_intermediate_size"),
        **expert_layers.from_keys(keys, _SPELLING, normalizes="route_norm"),
        **windowed.from_keys(keys),
        "num_dense_layers": keys.count("leading_dense_block_count", 0),
        "mup_enabled": True,
    }


def _absent_keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    return expert_layers.absent_keys(spec) | windowed.absent_keys(spec)


FAMILY = Family(
    model_type="afmoe",
    architecture="AfmoeForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("afmoe", _keys, _refusal, absent=_absent_keys, settings=_from_gguf),
)
