"""Solar Open: experts beside a shared one in every layer; llama.cpp computes it by GLM-4.5's graph.

Where ``partial_rotary_factor`` is absent, transformers turns whole heads, and so does our file. llama.cpp's converter
turns halves of them then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.rope_settings import RopeRule
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import expert_layers, from_gguf, llama_cpp, parts

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 196608,
    "hidden_size": 4096,
    "num_hidden_layers": 48,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "moe_intermediate_size": 1280,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
_TENSORS = (
    *parts.norms(feed_forward="post_attention_norm"),
    *parts.attention_matrices(),
    *expert_layers.tensors(parts.selection_bias_tensor()),
)


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    settings.require("first_k_dense_replace", 0)
    settings.require("use_qk_norm", False)
    settings.refuse_what_no_family_can_do()
    experts = expert_layers.biased_sigmoid_experts(settings)
    biases = parts.bias_tensors() if settings.flag("attention_bias", default=False) else ()
    attention = parts.attention(settings, rope=RopeRule(1_000_000.0, default_share=1.0))
    layer = parts.layer(settings, attention, experts, (*_TENSORS, *biases))
    return parts.model(settings, [layer] * settings.count("num_hidden_layers"))


def _settings(spec: ModelSpec) -> ConfigValues:
    return expert_layers.settings_beside_attention(spec)


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    return expert_layers.edited(spec, config)


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    return {**llama_cpp.usual_keys(spec, "expert_feed_forward_length"), **expert_layers.gguf_keys(spec)}


def _from_gguf(keys: GgufKeys) -> ConfigValues | None:
    """The settings; None for a GLM-4.5, of the same architecture, whose first layers are dense."""
    if keys.count("leading_dense_block_count", 0):
        return None
    return {
        **from_gguf.usual_settings(keys, n_experts="n_routed_experts", width="moe_intermediate_size"),
        **expert_layers.from_keys(keys),
        "attention_bias": from_gguf.has(keys, parts.bias_tensors()),
    }


FAMILY = Family(
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("glm4moe", _keys, absent=expert_layers.absent_keys, settings=_from_gguf),
)
