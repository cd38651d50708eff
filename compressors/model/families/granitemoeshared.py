"""Granite MoE with a shared expert: Granite 3 MoE, and an expert that every token goes through."""

from __future__ import annotations

from collections.abc import Mapping

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue
from compressors.model.description.feed_forward import Shared
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import granite

__all__ = ["FAMILY"]

_DEFAULTS = {**granite.DEFAULTS, "shared_intermediate_size": 0}
_SHARED_WIDTH = "expert_shared_feed_forward_length"


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS, nullable=("num_key_value_heads",))
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_bias", False)
    settings.require("sliding_window", None)
    settings.refuse_what_no_family_can_do()
    width = settings.whole_number("shared_intermediate_size")  # with 0 there is no shared expert
    experts = granite.experts(settings, Shared(width) if width else None)
    layer = granite.layer(settings, granite.attention(settings), granite.ATTENTION, experts)
    return granite.model(settings, [layer] * settings.count("num_hidden_layers"))


def _width(spec: ModelSpec) -> int:
    shared = granite.shared_expert(spec)
    return 0 if shared is None else shared.width


def _settings(spec: ModelSpec) -> ConfigValues:
    return {**granite.settings(spec), "shared_intermediate_size": _width(spec)}


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    width = _width(spec)
    return granite.gguf_keys(spec) | ({_SHARED_WIDTH: width} if width else {})


def _from_gguf(keys: GgufKeys) -> ConfigValues | None:
    """The settings; files of this architecture without a shared expert are another family's."""
    if _SHARED_WIDTH not in keys:
        return None
    return {**granite.from_keys(keys), "shared_intermediate_size": keys.count(_SHARED_WIDTH)}


FAMILY = Family(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    read=_read,
    edited=granite.edited,
    settings=_settings,
    gguf=GgufFamily("granitemoe", _keys, takes_rope_factors=True, settings=_from_gguf),
)
