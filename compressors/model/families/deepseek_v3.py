"""DeepSeek-V3, R1 and Moonlight: latent attention, leading dense layers, sigmoid scores with a bias for the choice.

Where ``rms_norm_eps`` is not 1e-6 (Moonlight's is 1e-5), llama.cpp normalises the vectors inside attention with another
epsilon than transformers, which has 1e-6 there: logits differ by about 1e-4. A larger one than
Moonlight's is refused for GGUF.
"""

from __future__ import annotations

from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared import expert_layers, from_gguf, latent, parts

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    settings.require("moe_layer_freq", 1)
    settings.ignore("num_mtp_layers")
    experts = latent.biased_sigmoid_experts(settings)
    return latent.model(settings, experts, expert_layers.leading_dense(settings), "first_k_dense_replace")


def _settings(spec: ModelSpec) -> ConfigValues:
    return latent.settings(spec) | {"first_k_dense_replace": parts.n_dense(spec)}


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    return expert_layers.edited(spec, config, "first_k_dense_replace")


def _from_gguf(keys: GgufKeys) -> ConfigValues | None:
    """The settings; None for a DeepSeek-V2, of the same architecture, whose scores are a softmax.

    GLM-4.7-Flash, which computes the same, becomes a DeepSeek-V3.
    """
    return latent.from_keys(keys) if latent.function_of(keys) == from_gguf.SIGMOID else None


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily(
        "deepseek2",
        latent.gguf_keys,
        latent.gguf_refusal,
        scales_attention=True,
        absent=latent.absent_keys,
        settings=_from_gguf,
    ),
    skipped=(expert_layers.MTP,),
    why_no_mtp="llama.cpp's converter leaves the layer for MTP of this family out, and nothing runs it there",
)
