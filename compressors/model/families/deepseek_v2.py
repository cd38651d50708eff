"""DeepSeek-V2 and V2-Lite: latent attention, and a softmax router that never normalises."""

from __future__ import annotations

from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily
from compressors.model.description.feed_forward import Shared
from compressors.model.description.routing import GroupScore, Routing
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import expert_layers, from_gguf, latent, parts

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_SPELLING = expert_layers.Spelling(alias="num_experts")


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_bias", False)
    settings.require("mlp_bias", False)
    settings.require("scoring_func", "softmax")
    settings.require("moe_layer_freq", 1)
    settings.require("topk_method", "greedy", "group_limited_greedy")
    settings.ignore("norm_topk_prob", "pretraining_tp")  # the class never normalises
    settings.ignore("head_dim")  # it puts qk_rope_head_dim in its place
    settings.refuse_what_no_family_can_do()
    n_experts = settings.count_of("num_experts", "n_routed_experts")
    top_k, width = settings.top_k(n_experts), settings.count("moe_intermediate_size")
    experts = parts.routed_in_mlp(
        n_experts=n_experts,
        top_k=top_k,
        width=width,
        routing=_routing(settings, n_experts, top_k),
        shared=Shared(width * settings.count("n_shared_experts")),
    )
    return latent.model(settings, experts, expert_layers.leading_dense(settings), "first_k_dense_replace")


def _routing(settings: FamilySettings, n_experts: int, top_k: int) -> Routing:
    routing = Routing(group_score=GroupScore.BEST, normalizes=False, scale=settings.number("routed_scaling_factor"))
    if settings.settings.get("topk_method", "greedy") == "greedy":
        settings.ignore("n_group", "topk_group")
        return routing
    return expert_layers.with_groups(settings, routing, n_experts, top_k)


def _settings(spec: ModelSpec) -> ConfigValues:
    return latent.settings(spec) | {"first_k_dense_replace": parts.n_dense(spec)}


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    return expert_layers.edited(spec, config, "first_k_dense_replace", spelling=_SPELLING)


def _refusal(spec: ModelSpec) -> str | None:
    rules = [layer.routed.routing for layer in spec.layers if layer.routed is not None]
    if all(rule.n_chosen_groups == rule.n_groups for rule in rules):
        return latent.gguf_refusal(spec)
    return "graph scores groups of experts by the sum of their best two, but this model's are scored by their best"


def _from_gguf(keys: GgufKeys) -> ConfigValues | None:
    """The settings; None for a DeepSeek-V3, of the same architecture, whose scores are sigmoids."""
    if latent.function_of(keys) != from_gguf.SOFTMAX:
        return None
    return {**latent.from_keys(keys), "topk_method": "greedy", "scoring_func": "softmax"}


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily(
        "deepseek2",
        latent.gguf_keys,
        _refusal,
        scales_attention=True,
        absent=latent.absent_keys,
        settings=_from_gguf,
    ),
)
