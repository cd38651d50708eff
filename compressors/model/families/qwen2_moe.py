"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): biases of queries, keys and values, and a shared expert behind a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue
from compressors.model.description.feed_forward import Shared
from compressors.model.description.routing import Routing
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import from_gguf, llama_cpp, parts, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
}
_TENSORS = (
    *parts.attention_tensors(),
    parts.router_tensor(),
    *parts.expert_tensors(),
    *parts.shared_expert_tensors("mlp.shared_expert", gate="mlp.shared_expert_gate"),
)


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    settings.require("hidden_act", "silu", "swish")
    settings.require("mlp_only_layers", [], None)
    settings.require("decoder_sparse_step", 1)
    settings.require("use_sliding_window", False)
    settings.ignore("intermediate_size", "sliding_window", "max_window_layers")  # their uses are refused above
    settings.refuse_what_no_family_can_do(kinds=("full_attention",))
    n_experts = settings.count("num_experts")  # this class of transformers has no other spelling
    experts = parts.routed_in_mlp(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts),
        width=settings.count("moe_intermediate_size"),
        routing=Routing(normalizes=settings.flag("norm_topk_prob", default=False)),
        shared=Shared(settings.count("shared_expert_intermediate_size"), is_gated=True),
    )
    attention = parts.attention(settings, window_switch="use_sliding_window")
    biases = parts.bias_tensors() if settings.flag("qkv_bias", default=True) else ()
    layer = parts.layer(settings, attention, experts, (*_TENSORS, *biases))
    return parts.model(settings, [layer] * settings.count("num_hidden_layers"))


def _settings(spec: ModelSpec) -> ConfigValues:
    (shared,) = {layer.routed.shared for layer in spec.layers if layer.routed is not None}
    assert shared is not None
    usual = written_config.usual_settings(
        spec, n_experts="num_experts", width="moe_intermediate_size", normalizes="norm_topk_prob"
    )
    return {**usual, "shared_expert_intermediate_size": shared.width}


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    counts = ("num_experts", "moe_intermediate_size", "num_experts_per_tok")
    return written_config.moe_edited(spec, config, *counts, other_spelling="num_local_experts")


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    (shared,) = {layer.routed.shared for layer in spec.layers if layer.routed is not None}
    assert shared is not None
    keys = llama_cpp.usual_keys(spec, "expert_feed_forward_length")
    return {**keys, "expert_shared_feed_forward_length": shared.width}


def _refusal(spec: ModelSpec) -> str | None:
    return (
        llama_cpp.normalization_refusal(spec, always=False)
        or llama_cpp.limit_of_square_queries(spec)
        or llama_cpp.limit_of_untied_head(spec)
    )


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    return {
        **from_gguf.usual_settings(keys, n_experts="num_experts", width="moe_intermediate_size"),
        "shared_expert_intermediate_size": keys.count("expert_shared_feed_forward_length"),
        "qkv_bias": from_gguf.has(keys, parts.bias_tensors()),
        "norm_topk_prob": False,
    }


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("qwen2moe", _keys, _refusal, settings=_from_gguf),
)
