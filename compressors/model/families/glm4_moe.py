"""GLM-4.5 and 4.6, GLM-4.5-Air: a half of each head is turned, some have norms of queries and keys.

The first layers are dense; behind them experts stand beside a shared one. Our file has begin, end and unknown tokens of
the tokenizer and ``config.json``, where llama.cpp's converter fixes them by their texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.rope_settings import RopeRule
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue
from compressors.model.description.mixers import QkNorm
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import expert_layers, from_gguf, llama_cpp, parts

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    settings.ignore("num_mtp_layers", "num_nextn_predict_layers")
    settings.refuse_what_no_family_can_do()
    experts = expert_layers.biased_sigmoid_experts(settings)
    has_biases = settings.flag("attention_bias", default=False)
    qk_norm = QkNorm.PER_HEAD if settings.flag("use_qk_norm", default=False) else QkNorm.NONE
    attention = parts.attention(settings, qk_norm, rope=RopeRule(default_share=0.5))
    of_attention = (
        *parts.norms(feed_forward="post_attention_norm"),
        *parts.attention_matrices(),
        *(parts.bias_tensors() if has_biases else ()),
        *(parts.qk_norm_tensors(qk_norm) if qk_norm is not QkNorm.NONE else ()),
    )
    are_dense = expert_layers.leading_dense(settings)
    of_experts = expert_layers.tensors(parts.selection_bias_tensor())
    layers = expert_layers.layers(
        settings, [attention] * len(are_dense), of_attention, experts, of_experts, are_dense, "first_k_dense_replace"
    )
    return parts.model(settings, layers)


def _settings(spec: ModelSpec) -> ConfigValues:
    of_layers = {"first_k_dense_replace": parts.n_dense(spec)}
    return expert_layers.settings_beside_attention(spec) | of_layers


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    return expert_layers.edited(spec, config, "first_k_dense_replace")


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    return {**llama_cpp.usual_keys(spec), **expert_layers.gguf_keys(spec)}


def _from_gguf(keys: GgufKeys) -> ConfigValues | None:
    """The settings; None for a Solar Open, of the same architecture, in which no layer is dense."""
    n_dense = keys.count("leading_dense_block_count", 0)
    if not n_dense:
        return None
    return {
        **from_gguf.usual_settings(keys, n_experts="n_routed_experts", width="moe_intermediate_size"),
        **expert_layers.from_keys(keys),
        "first_k_dense_replace": n_dense,
        "attention_bias": from_gguf.has(keys, parts.bias_tensors()),
        "use_qk_norm": from_gguf.has(keys, parts.qk_norm_tensors(QkNorm.PER_HEAD)),
    }


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("glm4moe", _keys, absent=expert_layers.absent_keys, settings=_from_gguf),
    skipped=(expert_layers.MTP,),
    mtp=expert_layers.mtp,
)
