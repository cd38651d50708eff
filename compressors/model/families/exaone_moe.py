"""K-EXAONE: layers with a window, which are turned, among layers without one, which are not.

Leading layers are dense; behind them experts stand beside a shared one, scored by sigmoids with a bias for the choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue, SkippedPart
from compressors.model.description.mixers import QkNorm
from compressors.model.description.mtp import MTP_PART
from compressors.model.description.rope import RopeKind
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import expert_layers, from_gguf, llama_cpp, parts, windowed, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
}
_SPELLING = expert_layers.Spelling(n_experts="num_experts", alias=None, n_shared="num_shared_experts")
_OF_ATTENTION = (*parts.attention_tensors(), *parts.qk_norm_tensors(QkNorm.PER_HEAD))
_BIAS = "e_score_correction_bias"
_OF_EXPERTS = expert_layers.tensors(parts.selection_bias_tensor(f"mlp.{_BIAS}", f"mlp.gate.{_BIAS}"))


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    settings.count("sliding_window")  # transformers takes no null, without which it would turn all layers
    settings.ignore("num_nextn_predict_layers")
    settings.refuse_what_no_family_can_do()
    experts = expert_layers.biased_sigmoid_experts(settings, _SPELLING)
    attention = parts.attention(settings, QkNorm.PER_HEAD, has_kinds=True)
    mixers = windowed.mixers(settings, attention, "sliding_window_pattern")
    layers = expert_layers.layers(
        settings,
        mixers,
        _OF_ATTENTION,
        experts,
        _OF_EXPERTS,
        expert_layers.kinds_of_dense(settings, expert_layers.leading_dense(settings)),
        "mlp_layer_types or first_k_dense_replace",
    )
    return parts.model(settings, layers)


def _settings(spec: ModelSpec) -> ConfigValues:
    of_layers = {
        "layer_types": written_config.attention_kinds(spec),
        "mlp_layer_types": expert_layers.dense_kinds(spec),
        "first_k_dense_replace": parts.n_dense(spec),
    }
    return expert_layers.settings_beside_attention(spec, _SPELLING) | of_layers


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    by_layer = ("layer_types", "mlp_layer_types", "first_k_dense_replace")
    absent = ("is_moe_layer", "first_last_k_dense_replace")
    return expert_layers.edited(spec, config, *by_layer, spelling=_SPELLING, absent=absent)


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    shared = parts.routed(spec).shared
    assert shared is not None
    return {
        **llama_cpp.usual_keys(spec),
        **expert_layers.gguf_keys(spec),
        "expert_shared_feed_forward_length": shared.width,
        **windowed.gguf_keys(spec),
    }


def _refusal(spec: ModelSpec) -> str | None:
    if spec.rope is not None and spec.rope.kind is RopeKind.LONGROPE:
        return "graph has one list of rotary factors, and this model another one for long texts"
    return llama_cpp.limit_of_untied_head(spec)


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    usual = from_gguf.usual_settings(keys, n_experts=_SPELLING.n_experts, width="moe_intermediate_size")
    n_dense = keys.count("leading_dense_block_count", 0)
    kinds = ["dense" if index < n_dense else "sparse" for index in range(usual["num_hidden_layers"])]
    return {
        **usual,
        **expert_layers.from_keys(keys, _SPELLING),
        **windowed.from_keys(keys),
        "first_k_dense_replace": n_dense,
        "mlp_layer_types": kinds,
    }


def _absent_keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    return expert_layers.absent_keys(spec) | windowed.absent_keys(spec)


FAMILY = Family(
    model_type="exaone_moe",
    architecture="ExaoneMoeForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("exaone-moe", _keys, _refusal, takes_rope_factors=True, absent=_absent_keys, settings=_from_gguf),
    skipped=(SkippedPart(r"mtp\..*", MTP_PART),),
    why_no_mtp="llama.cpp's exaone-moe graph loads a layer for MTP and never runs it",
)
