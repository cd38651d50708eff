"""Qwen3-MoE: norms of queries and keys in each head, and a softmax router whose weights may be normalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, DenseForm, Family, GgufFamily, GgufValue
from compressors.model.description.mixers import QkNorm
from compressors.model.description.routing import Routing
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import from_gguf, llama_cpp, parts, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
}
_TENSORS = (
    *parts.attention_tensors(),
    *parts.qk_norm_tensors(QkNorm.PER_HEAD),
    parts.router_tensor(),
    *parts.expert_tensors(),
)


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS, nullable=("sliding_window",))
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_bias", False)
    settings.require("mlp_only_layers", [], None)
    settings.require("decoder_sparse_step", 1)
    settings.ignore("intermediate_size")  # of layers without experts
    settings.refuse_what_no_family_can_do()
    n_experts = settings.count_of("num_local_experts", "num_experts")
    experts = parts.routed_in_mlp(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts),
        width=settings.count("moe_intermediate_size"),
        routing=Routing(normalizes=settings.flag("norm_topk_prob", default=False)),
    )
    attention = parts.attention(settings, QkNorm.PER_HEAD, window_switch="use_sliding_window")
    layer = parts.layer(settings, attention, experts, _TENSORS)
    return parts.model(settings, [layer] * settings.count("num_hidden_layers"))


def _settings(spec: ModelSpec) -> ConfigValues:
    return written_config.usual_settings(
        spec, n_experts="num_experts", width="moe_intermediate_size", normalizes="norm_topk_prob"
    )


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    counts = ("num_experts", "moe_intermediate_size", "num_experts_per_tok")
    return written_config.moe_edited(spec, config, *counts, other_spelling="num_local_experts")


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    return llama_cpp.usual_keys(spec, "expert_feed_forward_length")


def _refusal(spec: ModelSpec) -> str | None:
    return llama_cpp.normalization_refusal(spec, always=True)


_QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    edited=written_config.dense_edited,
    settings=written_config.dense_settings,
    gguf=GgufFamily("qwen3", llama_cpp.usual_keys),
)


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    usual = from_gguf.usual_settings(keys, n_experts="num_experts", width="moe_intermediate_size")
    return {**usual, "norm_topk_prob": True}


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("qwen3moe", _keys, _refusal, settings=_from_gguf),
    dense=DenseForm(_QWEN3, parts.dense_tensors()),
)
