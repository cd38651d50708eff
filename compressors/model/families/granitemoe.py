"""Granite 3 MoE: Llama's attention, fused experts, and factors of embeddings, attention, layers and logits."""

from __future__ import annotations

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, DenseForm, Family, GgufFamily
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import granite, parts, written_config

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


def _from_gguf(keys: GgufKeys) -> ConfigValues | None:
    """The settings; files of this architecture with a shared expert are another family's."""
    return None if "expert_shared_feed_forward_length" in keys else granite.from_keys(keys)


FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    read=_read,
    edited=granite.edited,
    settings=granite.settings,
    gguf=GgufFamily("granitemoe", granite.gguf_keys, takes_rope_factors=True, settings=_from_gguf),
    dense=DenseForm(_GRANITE, parts.dense_tensors()),
)
