"""DeepSeek-V3, R1 and Moonlight: latent attention, leading dense layers, sigmoid scores with a bias for the choice.

Where ``rms_norm_eps`` is not 1e-6 (Moonlight's is 1e-5), llama.cpp normalises the vectors inside attention with another
epsilon than transformers, which has 1e-6 there: logits differ by about 1e-4.
"""

from __future__ import annotations

from typing import Any

from compressors.model.description.family import ConfigValues, Family, GgufFamily
from compressors.model.description.family_settings import FamilySettings
from compressors.model.description.feed_forward import Shared
from compressors.model.description.routing import Routing, Score
from compressors.model.description.settings import Settings
from compressors.model.description.spec import ModelSpec
from compressors.model.families import latent, parts, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
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
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_bias", False)
    settings.require("rope_interleave", True)
    settings.require("scoring_func", "sigmoid")
    settings.require("topk_method", "noaux_tc")
    settings.require("moe_layer_freq", 1)
    settings.ignore("num_key_value_heads", "num_nextn_predict_layers", "num_mtp_layers", "pretraining_tp")
    settings.refuse_what_no_family_can_do()
    n_experts, width = settings.count("n_routed_experts"), settings.count("moe_intermediate_size")
    experts = parts.routed_in_mlp(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts),
        width=width,
        routing=Routing(
            Score.SIGMOID,
            has_selection_bias=True,
            n_groups=settings.count("n_group"),
            n_chosen_groups=settings.count("topk_group"),
            normalizes=settings.flag("norm_topk_prob", default=True),
            epsilon=1e-20,
            scale=settings.number("routed_scaling_factor"),
        ),
        shared=Shared(width * settings.count("n_shared_experts")),
        selection_bias="mlp.gate.e_score_correction_bias",
    )
    return latent.model(settings, experts, n_dense=settings.whole_number("first_k_dense_replace"))


def _settings(spec: ModelSpec) -> ConfigValues:
    return latent.settings(spec) | {"first_k_dense_replace": latent.n_dense(spec)}


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    return written_config.moe_edited(spec, config, *latent.COUNTS, "first_k_dense_replace")


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("deepseek2", latent.gguf_keys, scales_attention=True),
    skipped=(latent.MTP,),
)
