"""Granite 3 MoE: Llama's attention, fused experts, and factors of embeddings, attention, layers and logits."""

from __future__ import annotations

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, DenseForm, Family, GgufFamily
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import from_gguf, granite, parts, written_config

__all__ = ["FAMILY"]


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, granite.DEFAULTS, nullable=("num_key_value_heads",))
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_bias", False)
    settings.require("sliding_window", None)
    settings.refuse_what_no_family_can_do()
    attention = granite.attention(settings)
    layer = granite.layer(settings, attention, granite.ATTENTION, granite.experts(settings))
    return granite.model(settings, [layer] * settings.count("num_hidden_layers"))


def _dense_settings(spec: ModelSpec) -> ConfigValues:
    return written_config.dense_settings(spec) | granite.factors(spec)


_GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    edited=written_config.dense_edited,
    settings=_dense_settings,
    gguf=GgufFamily("granite", granite.gguf_keys, takes_rope_factors=True),
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
    edited=granite.edited,
    settings=granite.settings,
    gguf=GgufFamily("granitemoe", granite.gguf_keys, takes_rope_factors=True, settings=_from_gguf),
    dense=DenseForm(_GRANITE, parts.dense_tensors()),
)
