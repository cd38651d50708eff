"""ERNIE-4.5: leading dense layers, a softmax router with a bias for the choice, and a shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.rope_settings import RopeRule
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue, SkippedPart
from compressors.model.description.feed_forward import Routed, Shared
from compressors.model.description.mtp import MTP_PART
from compressors.model.description.routing import Routing
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import expert_layers, from_gguf, llama_cpp, parts, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_norm_min": 1e-12,
}
_BIAS = "moe_statics.e_score_correction_bias"
_EXPERTS = (
    parts.router_tensor(),
    parts.selection_bias_tensor(f"mlp.{_BIAS}", f"mlp.gate.{_BIAS}", ("1", "E")),
    *parts.expert_tensors(),
)
_MTP = SkippedPart(r"model\.mtp_.*", MTP_PART)
_NORMALIZED_FROM = 2**-14
"""llama.cpp divides weights by their sum, or by this if the sum is smaller (``build_moe_ffn``)."""


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    settings.require("hidden_act", "silu", "swish")
    settings.require("use_bias", False)
    settings.require("sliding_window", None)
    settings.require("moe_layer_interval", 1)
    settings.refuse_what_no_family_can_do(kinds=("full_attention",))
    are_dense = _are_dense(settings)
    attention = parts.attention(settings, rope=RopeRule(500_000.0, interleaved=True))
    experts = _experts(settings)
    shared = parts.shared_expert_tensors("mlp.shared_experts") if experts.shared is not None else ()
    layers = expert_layers.layers(
        settings,
        [attention] * len(are_dense),
        parts.attention_tensors(),
        experts,
        (*_EXPERTS, *shared),
        are_dense,
        "moe_layer_start_index and moe_layer_end_index",
    )
    return parts.model(settings, layers, tied_by_default=True)


def _are_dense(settings: FamilySettings) -> list[bool]:
    """Says of each layer whether it is dense: those in front of a first one, and those behind a last one."""
    n_layers, end = settings.count("num_hidden_layers"), "moe_layer_end_index"
    first = settings.whole_number("moe_layer_start_index")
    last = n_layers - 1 if settings.settings.get(end, -1) == -1 else settings.whole_number(end)
    settings.settings.note(end, last)
    return [not first <= index <= last for index in range(n_layers)]


def _experts(settings: FamilySettings) -> Routed:
    n_experts, width = settings.count_of("num_experts", "moe_num_experts"), settings.count("moe_intermediate_size")
    n_shared = settings.whole_number("moe_num_shared_experts")
    return parts.routed_in_mlp(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts, "num_experts_per_tok", "moe_k"),
        width=width,
        routing=Routing(has_selection_bias=True, least_sum=settings.number("moe_norm_min")),
        shared=Shared(width * n_shared) if n_shared else None,
    )


def _n_leading_dense(spec: ModelSpec) -> int:
    return next(index for index, layer in enumerate(spec.layers) if layer.routed is not None)


def _settings(spec: ModelSpec) -> ConfigValues:
    found = written_config.usual_settings(
        spec, n_experts="moe_num_experts", width="moe_intermediate_size", normalizes=None, top_k="moe_k"
    )
    found |= {
        "moe_num_shared_experts": written_config.n_shared_experts(spec),
        "moe_layer_start_index": _n_leading_dense(spec),
        "moe_layer_end_index": max(index for index, layer in enumerate(spec.layers) if layer.routed is not None),
        "moe_norm_min": parts.routed(spec).routing.least_sum,
    }
    return found | written_config.dense_width(spec)


_COUNTS = (
    "moe_num_experts",
    "moe_intermediate_size",
    "moe_num_shared_experts",
    "moe_k",
    "moe_layer_start_index",
    "moe_layer_end_index",
)


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    others = {key: value for key, value in config.items() if key != "num_experts_per_tok"}
    return written_config.moe_edited(spec, others, *_COUNTS, other_spelling="num_experts")


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    """The keys of llama.cpp's graph, which could have layers with experts at intervals, but loads them in all.

    llama.cpp's converter takes the shared expert's width from other numbers, which fit the models on the hub.
    """
    routed = parts.routed(spec)
    keys = llama_cpp.usual_keys(spec) | {
        "expert_feed_forward_length": routed.width,
        "interleave_moe_layer_step": 1,
        "leading_dense_block_count": _n_leading_dense(spec),
        "expert_shared_count": written_config.n_shared_experts(spec),
    }
    return keys if routed.shared is None else keys | {"expert_shared_feed_forward_length": routed.shared.width}


def _refusal(spec: ModelSpec) -> str | None:
    least = parts.routed(spec).routing.least_sum
    if least <= _NORMALIZED_FROM:
        return None
    return f"graph divides weights by their sum from {_NORMALIZED_FROM:g} on, this model from moe_norm_min, {least:g}"


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    usual = from_gguf.usual_settings(keys, n_experts="moe_num_experts", width="moe_intermediate_size", top_k="moe_k")
    return {
        **usual,
        **from_gguf.dense_width(keys),
        "moe_num_shared_experts": keys.count("expert_shared_count", 0),
        "moe_layer_start_index": keys.count("leading_dense_block_count", 0),
        "moe_layer_end_index": usual["num_hidden_layers"] - 1,
    }


FAMILY = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("ernie4_5-moe", _keys, _refusal, settings=_from_gguf),
    skipped=(_MTP,),
    why_no_mtp="llama.cpp's ernie4_5-moe graph has no layer for MTP",
)
