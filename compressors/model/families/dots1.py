"""dots.llm1: norms of queries and keys, leading dense layers, and sigmoid scores with a bias for the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue
from compressors.model.description.mixers import QkNorm
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import expert_layers, from_gguf, llama_cpp, parts, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 4608,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 62,
}
_OF_ATTENTION = (*parts.attention_tensors(), *parts.qk_norm_tensors(QkNorm.PER_HEAD))
_OF_EXPERTS = expert_layers.tensors(parts.selection_bias_tensor())


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS, nullable=("num_key_value_heads",))
    settings.require("attention_bias", False)
    settings.refuse_what_no_family_can_do()
    experts = expert_layers.biased_sigmoid_experts(
        settings, normalizes_by_default=False, scoring=("sigmoid", "noaux_tc")
    )
    attention = parts.attention(settings, QkNorm.PER_HEAD, has_kinds=True)
    mixers = [replace(attention, window=window) for window in settings.layer_windows(_usual_kinds(settings))]
    are_dense = expert_layers.leading_dense(settings)
    layers = expert_layers.layers(
        settings, mixers, _OF_ATTENTION, experts, _OF_EXPERTS, are_dense, "first_k_dense_replace"
    )
    return parts.model(settings, layers)


def _usual_kinds(settings: FamilySettings) -> list[str]:
    """The kinds of layers where no list says them: those behind ``max_window_layers`` have the window, if any."""
    without = settings.whole_number("max_window_layers")
    has_window = settings.settings.get("sliding_window", _DEFAULTS["sliding_window"]) is not None
    return [
        "sliding_attention" if has_window and index >= without else "full_attention"
        for index in range(settings.count("num_hidden_layers"))
    ]


def _settings(spec: ModelSpec) -> ConfigValues:
    of_layers = {
        "first_k_dense_replace": parts.n_dense(spec),
        "layer_types": written_config.attention_kinds(spec),
    }
    return expert_layers.settings_beside_attention(spec) | of_layers


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    return expert_layers.edited(spec, config, "first_k_dense_replace", "layer_types")


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    return {**llama_cpp.usual_keys(spec), **expert_layers.gguf_keys(spec)}


def _refusal(spec: ModelSpec) -> str | None:
    mixer = parts.grouped_query(spec)
    if mixer.n_kv_heads != mixer.n_heads:
        return f"graph needs keys and values for each of the {mixer.n_heads} heads; this model has {mixer.n_kv_heads}"
    return llama_cpp.limit_of_windows(spec) or llama_cpp.limit_of_untied_head(spec)


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    usual = from_gguf.usual_settings(keys, n_experts="n_routed_experts", width="moe_intermediate_size")
    return {
        **usual,
        **expert_layers.from_keys(keys),
        "first_k_dense_replace": keys.count("leading_dense_block_count", 0),
        "layer_types": ["full_attention"] * usual["num_hidden_layers"],
        "sliding_window": None,
    }


FAMILY = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("dots1", _keys, _refusal, absent=expert_layers.absent_keys, settings=_from_gguf),
)
