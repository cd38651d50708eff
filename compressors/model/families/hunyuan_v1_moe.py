"""Hunyuan-A13B: norms of queries and keys behind the rotary embedding, and a shared expert as wide as the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.rope_settings import RopeRule
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue
from compressors.model.description.feed_forward import Routed, Shared
from compressors.model.description.mixers import QkNorm
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError
from compressors.model.families.shared import from_gguf, llama_cpp, parts, written_config
from compressors.model.names import shown

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 290943,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "num_experts": 1,
    "moe_topk": 1,
}
_ATTENTION = "model.layers.{layer}.self_attn."
_TENSORS = (
    *parts.attention_tensors(),
    parts.norm(Role.QUERY_NORM, f"{_ATTENTION}query_layernorm.weight", ("h",), "blk.{layer}.attn_q_norm.weight"),
    parts.norm(Role.KEY_NORM, f"{_ATTENTION}key_layernorm.weight", ("h",), "blk.{layer}.attn_k_norm.weight"),
    parts.router_tensor("mlp.gate.wg.weight", "mlp.gate.wg.weight"),
    *parts.expert_tensors(),
    *parts.shared_expert_tensors("mlp.shared_mlp"),
)
_TOP_K, _WIDTH, _SHARED = "moe_topk", "moe_intermediate_size", "num_shared_expert"
"""Settings that may be a list with a number for each layer. Only the model's own code reads the last two."""


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS, nullable=("num_key_value_heads", "head_dim"))
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_bias", False)
    settings.require("sliding_window", None)
    settings.require("moe_layer_num_skipped", 0)
    settings.require("use_cla", False)
    settings.ignore("pretraining_tp", "eod_token_id", "sep_token_id")
    settings.refuse_what_no_family_can_do(kinds=("full_attention",))
    attention = parts.attention(settings, QkNorm.PER_HEAD, rope=RopeRule(takes_alpha=True))
    layer = parts.layer(settings, replace(attention, turns_before_norms=True), _experts(settings), _TENSORS)
    return parts.model(settings, [layer] * settings.count("num_hidden_layers"))


def _experts(settings: FamilySettings) -> Routed:
    n_experts, width = settings.count_of("num_local_experts", "num_experts"), settings.count("intermediate_size")
    _require_everywhere(settings, _WIDTH, width)
    _require_everywhere(settings, _SHARED, 1)
    return parts.routed_in_mlp(
        n_experts=n_experts, top_k=_top_k(settings, n_experts), width=width, routing=Routing(), shared=Shared(width)
    )


def _require_everywhere(settings: FamilySettings, key: str, wanted: int) -> None:
    """Refuses a number that is not the one in each layer that transformers' class goes by.

    Raises:
        UnsupportedError: there is one.
    """
    value = settings.settings.get(key, wanted)
    settings.settings.note(key, value)
    if value not in (wanted, [wanted] * settings.count("num_hidden_layers")):
        raise UnsupportedError(
            f"{settings.settings.named(key)} is {shown(value)}, but transformers' {FAMILY.architecture} goes by "
            f"{wanted} in each layer"
        )


def _top_k(settings: FamilySettings, n_experts: int) -> int:
    """Experts of each token: a number, or a list of equal ones.

    Raises:
        UnsupportedError: the list has different numbers, or another length than there are layers.
    """
    value = settings.settings.get("num_experts_per_tok", settings.settings.get(_TOP_K))
    if not isinstance(value, list):
        return settings.top_k(n_experts, "num_experts_per_tok", _TOP_K)
    if len(value) != settings.count("num_hidden_layers") or value != value[:1] * len(value):
        raise UnsupportedError(
            f"{settings.settings.named(_TOP_K)} is {shown(value)}; it must be one number, or the same for each layer"
        )
    for key in (_TOP_K, "num_experts_per_tok"):
        settings.settings.note(key, value)
    return FamilySettings(Settings({_TOP_K: value[0]}, settings.settings.path), FAMILY, {}).top_k(n_experts, _TOP_K)


def _settings(spec: ModelSpec) -> ConfigValues:
    return written_config.usual_settings(
        spec, n_experts="num_experts", width="intermediate_size", normalizes=None, top_k=_TOP_K
    )


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    absent = ("num_local_experts", "num_experts_per_tok")
    others = {key: value for key, value in config.items() if key not in absent}
    edited = written_config.moe_edited(spec, others, "num_experts", "intermediate_size", _TOP_K, "head_dim")
    numbers = {_TOP_K: spec.top_k, _WIDTH: spec.expert_width, _SHARED: 1}
    lists = {key: [number] * spec.n_layers for key, number in numbers.items() if isinstance(config.get(key), list)}
    return edited | lists | ({_WIDTH: spec.expert_width} if isinstance(config.get(_WIDTH), int) else {})


def _shared_width(spec: ModelSpec) -> int:
    (shared,) = {layer.routed.shared for layer in spec.layers if layer.routed is not None}
    assert shared is not None
    return shared.width


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    return llama_cpp.usual_keys(spec) | {
        "expert_feed_forward_length": spec.expert_width,
        "expert_shared_count": 1,
        "expert_shared_feed_forward_length": _shared_width(spec),
    }


def _refusal(spec: ModelSpec) -> str | None:
    shared = _shared_width(spec)
    if spec.expert_width == shared:
        return None
    return (
        f"has one width for routed experts and the shared one; this model's are {spec.expert_width} and {shared} wide"
    )


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    return from_gguf.usual_settings(keys, n_experts="num_experts", width="intermediate_size", top_k=_TOP_K)


FAMILY = Family(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("hunyuan-moe", _keys, settings=_from_gguf),
    refusal=_refusal,
)
