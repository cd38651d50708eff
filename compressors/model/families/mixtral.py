"""Mixtral: Llama's attention, and a softmax router that always normalises. llama.cpp takes it for a Llama."""

from __future__ import annotations

from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.rope_settings import RopeRule
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, DenseForm, Family, GgufFamily
from compressors.model.description.routing import Routing
from compressors.model.description.spec import ModelSpec
from compressors.model.description.transforms import InterleaveRotary
from compressors.model.families.shared import from_gguf, llama_cpp, parts, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 14336,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
_EXPERT = "block_sparse_moe.experts.{expert}."
_TENSORS = (
    *parts.attention_tensors(InterleaveRotary()),
    parts.router_tensor("block_sparse_moe.gate.weight"),
    *parts.expert_tensors(gate=f"{_EXPERT}w1.weight", up=f"{_EXPERT}w3.weight", down=f"{_EXPERT}w2.weight"),
)


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS, nullable=("head_dim", "sliding_window"))
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_bias", False)
    settings.refuse_what_no_family_can_do()
    n_experts = settings.count_of("num_experts", "num_local_experts")
    experts = parts.routed_in_mlp(n_experts, settings.top_k(n_experts), settings.count("intermediate_size"), Routing())
    attention = parts.attention(settings, rope=RopeRule(1_000_000.0))
    layer = parts.layer(settings, attention, experts, _TENSORS)
    return parts.model(settings, [layer] * settings.count("num_hidden_layers"))


def _settings(spec: ModelSpec) -> ConfigValues:
    return written_config.usual_settings(
        spec, n_experts="num_local_experts", width="intermediate_size", normalizes=None
    )


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    counts = ("num_local_experts", "intermediate_size", "num_experts_per_tok")
    return written_config.moe_edited(spec, config, *counts, other_spelling="num_experts")


def _refusal(spec: ModelSpec) -> str | None:
    return llama_cpp.normalization_refusal(spec, always=True)


def _mistral_edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    return {"sliding_window": None, **written_config.dense_edited(spec, config)}  # Mistral's default is a window


_MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    edited=_mistral_edited,
    settings=written_config.dense_settings,
    gguf=GgufFamily("llama", llama_cpp.usual_keys, takes_rope_factors=True),
)


def _from_gguf(keys: GgufKeys) -> ConfigValues | None:
    """The settings; None for a dense Llama, of the same architecture."""
    if not keys.count("expert_count", 0):
        return None
    usual = from_gguf.usual_settings(
        keys, n_experts="num_local_experts", width="intermediate_size", width_key="feed_forward_length"
    )
    return {**usual, "sliding_window": None}


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("llama", llama_cpp.usual_keys, _refusal, takes_rope_factors=True, settings=_from_gguf),
    dense=DenseForm(_MISTRAL, parts.dense_tensors()),
)
