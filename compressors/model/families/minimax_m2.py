"""MiniMax-M2: sigmoid scores with a bias for the choice, norms over all queries and keys, heads turned in part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.rope_settings import RopeRule
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue
from compressors.model.description.mixers import QkNorm
from compressors.model.description.routing import Routing, Score
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import from_gguf, llama_cpp, parts, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 196608,
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": 8,
    "num_local_experts": 256,
}
_BLOCK = "block_sparse_moe"
_EXPERT = f"{_BLOCK}.experts.{{expert}}."
_TENSORS = (
    *parts.attention_tensors(),
    *parts.qk_norm_tensors(QkNorm.WHOLE),
    parts.router_tensor(f"{_BLOCK}.gate.weight"),
    parts.selection_bias_tensor(f"{_BLOCK}.e_score_correction_bias", "mlp.e_score_correction_bias"),
    *parts.expert_tensors(gate=f"{_EXPERT}w1.weight", up=f"{_EXPERT}w3.weight", down=f"{_EXPERT}w2.weight"),
)


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    _require_what_transformers_computes(settings)
    n_experts = settings.count_of("num_experts", "num_local_experts")
    experts = parts.routed_in_mlp(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts),
        width=settings.count("intermediate_size"),
        routing=Routing(Score.SIGMOID, has_selection_bias=True),
    )
    rope = RopeRule(5_000_000.0, default_share=_share_turned(settings))
    attention = parts.attention(settings, QkNorm.WHOLE, rope=rope)
    layer = parts.layer(settings, attention, experts, _TENSORS)
    return parts.model(settings, [layer] * settings.count("num_hidden_layers"))


def _require_what_transformers_computes(settings: FamilySettings) -> None:
    """Refuses settings of the model's own code that transformers' class does not read."""
    settings.require("hidden_act", "silu", "swish")
    settings.require("sliding_window", None)
    settings.require("scoring_func", "sigmoid")
    settings.require("use_routing_bias", True)
    settings.require("use_qk_norm", True)
    settings.require("shared_intermediate_size", 0)
    settings.refuse_what_no_family_can_do(kinds=("full_attention",))


def _share_turned(settings: FamilySettings) -> float:
    """The share of a head that is turned, where ``partial_rotary_factor`` does not say it."""
    if settings.settings.get("rotary_dim") is None:
        return 1.0
    _, _, head_dim = settings.heads()
    return settings.count("rotary_dim") / head_dim


def _settings(spec: ModelSpec) -> ConfigValues:
    return written_config.usual_settings(
        spec, n_experts="num_local_experts", width="intermediate_size", normalizes=None
    )


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    counts = ("num_local_experts", "intermediate_size", "num_experts_per_tok")
    return written_config.moe_edited(spec, config, *counts, other_spelling="num_experts")


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    return llama_cpp.usual_keys(spec) | {
        "expert_feed_forward_length": spec.expert_width,
        "expert_gating_func": llama_cpp.GATING_FUNCTIONS[Score.SIGMOID],
    }


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    usual = from_gguf.usual_settings(keys, n_experts="num_local_experts", width="intermediate_size")
    usual.pop("partial_rotary_factor", None)
    return {**usual, "rotary_dim": keys.count("rope.dimension_count", usual["head_dim"])}


FAMILY = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("minimax-m2", _keys, llama_cpp.limit_of_untied_head, settings=_from_gguf),
)
