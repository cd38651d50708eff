"""GLM-4.7-Flash: DeepSeek-V3's block, with its layers' kinds in a list.

llama.cpp normalises the vectors inside attention with ``rms_norm_eps``, transformers with 1e-6: logits differ by about
1e-4. Our file says that scores are sigmoids; llama.cpp's converter leaves that to the number of layers and tokens. It
also fixes begin, end and unknown tokens by their texts, where ours are those of the tokenizer and ``config.json``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import expert_layers, latent

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.8,
    "kv_lora_rank": 512,
    "q_lora_rank": 768,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "qk_nope_head_dim": 192,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
}


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    experts = latent.biased_sigmoid_experts(settings)
    rope_rule = replace(latent.ROPE, default_share=1.0)
    return latent.model(settings, experts, _are_dense(settings), "mlp_layer_types", rope_rule)


def _are_dense(settings: FamilySettings) -> list[bool]:
    """Says of each layer whether it is dense: the first alone, unless a list says otherwise."""
    return expert_layers.kinds_of_dense(settings, [index == 0 for index in range(settings.count("num_hidden_layers"))])


def _settings(spec: ModelSpec) -> ConfigValues:
    return latent.settings(spec) | {"mlp_layer_types": expert_layers.dense_kinds(spec)}


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    return expert_layers.edited(spec, config, "mlp_layer_types", absent=("first_k_dense_replace",))


FAMILY = Family(
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("deepseek2", latent.gguf_keys, latent.gguf_refusal, scales_attention=True),
    skipped=(expert_layers.MTP,),
    mtp=expert_layers.mtp,
)
