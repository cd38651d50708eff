"""Granite 3 MoE: Llama's attention, fused experts, and factors of embeddings, attention, layers and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, DenseForm, Family, GgufFamily, GgufValue
from compressors.model.description.feed_forward import LostModule, Routed
from compressors.model.description.routing import Routing, Score
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import Fused
from compressors.model.description.transforms import InterleaveRotary
from compressors.model.families.shared import from_gguf, llama_cpp, parts, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "intermediate_size": 11008,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
_BLOCK = "block_sparse_moe"
_ON_DISK = f"model.layers.{{layer}}.{_BLOCK}"
_TENSORS = (
    *parts.attention_tensors(InterleaveRotary()),
    parts.router_tensor(f"{_BLOCK}.router.layer.weight", module=f"{_BLOCK}.router.weight"),
    *parts.fused_expert_tensors(Fused(f"{_ON_DISK}.input_linear.weight"), Fused(f"{_ON_DISK}.output_linear.weight")),
)


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS, nullable=("num_key_value_heads",))
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_bias", False)
    settings.require("sliding_window", None)
    settings.refuse_what_no_family_can_do()
    n_experts = settings.count("num_local_experts")
    experts = Routed(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts),
        width=settings.count("intermediate_size"),
        routing=Routing(Score.LOGITS),
        experts_module=f"{_BLOCK}.experts",
        block=(LostModule(_BLOCK),),
    )
    attention = parts.attention(settings, scale=settings.number("attention_multiplier"))
    residual_scale = settings.number("residual_multiplier")
    layer = parts.layer(settings, attention, experts, _TENSORS, residual_scale=residual_scale)
    return parts.model(
        settings,
        [layer] * settings.count("num_hidden_layers"),
        embedding_scale=settings.number("embedding_multiplier"),
        logit_divisor=settings.number("logits_scaling"),
    )


def _factors(spec: ModelSpec) -> dict[str, float]:
    """The settings of the factors."""
    (residual_scale,) = {layer.residual_scale for layer in spec.layers}
    return {
        "embedding_multiplier": spec.embedding_scale,
        "attention_multiplier": parts.grouped_query(spec).scale,
        "residual_multiplier": residual_scale,
        "logits_scaling": spec.logit_divisor,
    }


def _settings(spec: ModelSpec) -> ConfigValues:
    usual = written_config.usual_settings(
        spec, n_experts="num_local_experts", width="intermediate_size", normalizes=None
    )
    return usual | _factors(spec)


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    return written_config.moe_edited(spec, config, "num_local_experts", "intermediate_size", "num_experts_per_tok")


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    (residual_scale,) = {layer.residual_scale for layer in spec.layers}
    return {
        **llama_cpp.usual_keys(spec),
        "attention.scale": parts.grouped_query(spec).scale,
        "embedding_scale": spec.embedding_scale,
        "residual_scale": residual_scale,
        "logit_scale": spec.logit_divisor,
    }


def _dense_settings(spec: ModelSpec) -> ConfigValues:
    return written_config.dense_settings(spec) | _factors(spec)


_GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    edited=written_config.dense_edited,
    settings=_dense_settings,
    gguf=GgufFamily("granite", _keys, takes_rope_factors=True),
)


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    usual = from_gguf.usual_settings(
        keys, n_experts="num_local_experts", width="intermediate_size", width_key="feed_forward_length"
    )
    return {
        **usual,
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "attention_multiplier": keys.number("attention.scale", usual["head_dim"] ** -0.5),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "logits_scaling": keys.number("logit_scale"),
    }


FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("granitemoe", _keys, takes_rope_factors=True, settings=_from_gguf),
    dense=DenseForm(_GRANITE, parts.dense_tensors()),
)
