"""OLMoE: norms over all queries and all keys, and a softmax router that does not normalise.

No dense model differs from it in its experts alone: OLMo's norms have no weights, and OLMo 2 and 3 normalise what
attention and feed-forward give, not what they take.
"""

from __future__ import annotations

from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily
from compressors.model.description.mixers import QkNorm
from compressors.model.description.routing import Routing
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import from_gguf, llama_cpp, parts, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "num_experts": 64,
}
_TENSORS = (
    *parts.attention_tensors(),
    *parts.qk_norm_tensors(QkNorm.WHOLE),
    parts.router_tensor(),
    *parts.expert_tensors(),
)


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS, nullable=("num_key_value_heads",))
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_bias", False)
    settings.require("clip_qkv", None)
    settings.refuse_what_no_family_can_do()
    n_experts = settings.count_of("num_local_experts", "num_experts")
    experts = parts.routed_in_mlp(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts),
        width=settings.count("intermediate_size"),
        routing=Routing(normalizes=settings.flag("norm_topk_prob", default=False)),
    )
    layer = parts.layer(settings, parts.attention(settings, QkNorm.WHOLE), experts, _TENSORS)
    return parts.model(settings, [layer] * settings.count("num_hidden_layers"))


def _settings(spec: ModelSpec) -> ConfigValues:
    return written_config.usual_settings(
        spec, n_experts="num_experts", width="intermediate_size", normalizes="norm_topk_prob"
    )


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    counts = ("num_experts", "intermediate_size", "num_experts_per_tok")
    return written_config.moe_edited(spec, config, *counts, other_spelling="num_local_experts")


def _refusal(spec: ModelSpec) -> str | None:
    return (
        llama_cpp.normalization_refusal(spec, always=False)
        or llama_cpp.limit_of_square_attention(spec)
        or llama_cpp.limit_of_untied_head(spec)
    )


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    usual = from_gguf.usual_settings(
        keys, n_experts="num_experts", width="intermediate_size", width_key="feed_forward_length"
    )
    return {**usual, "norm_topk_prob": False}


FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("olmoe", llama_cpp.usual_keys, _refusal, settings=_from_gguf),
)
