"""The families that are tested on random weights: a row for each, with its name and peculiarities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """A tiny model of a family.

    Attributes:
        sizes: settings of transformers' configuration that differ from the common ones.
        on_the_hub: settings of ``config.json`` as the hub's files spell them, in place of transformers'; None: absent.
        formats: the containers that it is written to.
        logit_error: the largest difference of llama.cpp's logits from torch's, relative to their standard deviation.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    on_the_hub: Mapping[str, Any] = field(default_factory=dict)
    formats: tuple[str, ...] = ("gguf", "onnx")
    logit_error: float = 1e-3


COMMON: Mapping[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
"""Settings of all rows."""

_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}

_NEMOTRON: Mapping[str, Any] = {
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "n_routed_experts": 8,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
}

_GLM4_MOE: Mapping[str, Any] = {"head_dim": 32, "n_routed_experts": 8}

_YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
}

_DELTA: Mapping[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 48,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

_GRANITE: Mapping[str, Any] = {
    "num_local_experts": 8,
    "intermediate_size": 32,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
    "tie_word_embeddings": True,
}
_GRANITE_ON_THE_HUB: Mapping[str, Any] = {
    "rope_theta": 10000,
    "rope_parameters": None,
    "rope_scaling": None,
    "num_experts": None,
}

ROWS: Mapping[str, Row] = {
    "afmoe": Row(
        sizes={
            "num_hidden_layers": 5,
            "num_dense_layers": 1,
            "head_dim": 32,
            "num_shared_experts": 1,
            "route_scale": 2.5,
            "sliding_window": 12,
            "mup_enabled": True,
        },
        on_the_hub={
            "rope_theta": 1e4,
            "rope_parameters": None,
            "layer_types": None,
            "score_func": "sigmoid",
            "route_norm": True,
        },
    ),
    "deepseek_v2": Row(
        sizes={
            **_LATENT,
            "n_routed_experts": 8,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "n_shared_experts": 2,
        },
        on_the_hub={"rope_theta": 1e4, "rope_parameters": None, "scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    "deepseek_v2 with YaRN": Row(
        sizes={
            **_LATENT,
            "n_routed_experts": 8,
            "first_k_dense_replace": 1,
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707, "rope_theta": 1e4},
        },
    ),
    "deepseek_v3": Row(
        sizes={**_LATENT, "n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
        on_the_hub={"rope_theta": 1e4, "rope_parameters": None, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    ),
    "dots1": Row(
        sizes={
            "num_key_value_heads": 4,
            "head_dim": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        on_the_hub={
            "rope_theta": 1e7,
            "rope_parameters": None,
            "layer_types": None,
            "sliding_window": None,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
    ),
    "ernie4_5_moe": Row(
        sizes={
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "intermediate_size": 128,  # the converter takes 128 / 2 for the width of the shared expert
        },
        on_the_hub={"rope_theta": 5e5, "rope_parameters": None, "moe_layer_end_index": -1},
    ),
    "exaone_moe": Row(
        sizes={
            "num_hidden_layers": 4,
            "head_dim": 32,
            "sliding_window": 12,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e6,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
        on_the_hub={"mlp_layer_types": None, "layer_types": None, "scoring_func": "sigmoid"},
    ),
    "gemma4_text": Row(
        sizes={
            "num_hidden_layers": 4,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
        on_the_hub={"per_layer_config": None, "global_head_dim": 32, "num_global_key_value_heads": 1},
        logit_error=1.5e-2,  # ggml's GELU is a table of half precision
    ),
    "glm4_moe": Row(
        sizes={**_GLM4_MOE, "attention_bias": True, "use_qk_norm": True},
        on_the_hub={"rope_theta": 1e6, "rope_parameters": None, "partial_rotary_factor": 0.5},
    ),
    "glm4_moe with groups": Row(
        sizes={**_GLM4_MOE, "n_group": 2, "routed_scaling_factor": 2.5, "n_shared_experts": 2},
        on_the_hub={"num_mtp_layers": None, "num_nextn_predict_layers": 1},
    ),
    "glm4_moe_lite": Row(
        sizes={**_LATENT, "n_routed_experts": 8, "n_group": 1, "topk_group": 1},
        on_the_hub={
            "rope_theta": 1e6,
            "rope_parameters": None,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
        },
    ),
    "gpt_oss": Row(
        sizes={
            "num_hidden_layers": 4,
            "num_local_experts": 8,
            "intermediate_size": 32,
            "head_dim": 16,
            "sliding_window": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": True,
                "original_max_position_embeddings": 4096,
            },
        },
        on_the_hub={
            "rope_theta": 150000,
            "rope_parameters": None,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": True,  # the hub's files say false, which llama.cpp cannot compute
                "original_max_position_embeddings": 4096,
            },
            "experts_per_token": 2,
            "initial_context_length": 4096,
        },
    ),
    "granitemoe": Row(sizes=_GRANITE, on_the_hub=_GRANITE_ON_THE_HUB),
    "granitemoehybrid": Row(
        sizes={
            **_GRANITE,
            "num_hidden_layers": 4,
            "shared_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "mamba_n_heads": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
            "position_embedding_type": "nope",
        },
        on_the_hub={
            **_GRANITE_ON_THE_HUB,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "mamba_d_head": 16,
            "normalization_function": "rmsnorm",
            "time_step_limit": [0.0, float("inf")],
        },
    ),
    "granitemoeshared": Row(sizes={**_GRANITE, "shared_intermediate_size": 48}, on_the_hub=_GRANITE_ON_THE_HUB),
    "hunyuan_v1_moe": Row(
        sizes={
            "hidden_size": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 128,  # the converter takes no other where the base is stretched
            "intermediate_size": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0},
        },
        on_the_hub={
            "rope_theta": 1e4,
            "rope_parameters": None,
            "rope_scaling": {
                "alpha": 1000.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "type": "dynamic",
            },
            "moe_topk": [2] * 3,
            "moe_intermediate_size": [32] * 3,
            "num_shared_expert": [1] * 3,
            "moe_layer_num_skipped": 0,
            "use_cla": False,
        },
    ),
    "lfm2_moe": Row(
        sizes={
            "num_hidden_layers": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "tie_word_embeddings": True,  # the converter knows no other
        },
        on_the_hub={"rope_theta": 1e6, "rope_parameters": None, "tie_embedding": True, "tie_word_embeddings": None},
    ),
    "minimax_m2": Row(
        sizes={
            "num_local_experts": 8,
            "intermediate_size": 32,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        },
        on_the_hub={
            "rope_theta": 5e6,
            "rotary_dim": 16,
            "rope_parameters": None,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "use_qk_norm": True,
            "shared_intermediate_size": 0,
        },
    ),
    "mixtral": Row(
        sizes={"num_local_experts": 8, "intermediate_size": 32},
        on_the_hub={"rope_theta": 1e6, "rope_parameters": None, "sliding_window": None},
    ),
    "nemotron_h": Row(
        sizes={
            **_NEMOTRON,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "moe"],
        },
        on_the_hub={
            "layers_block_type": None,
            "hybrid_override_pattern": "ME*ME",
            "num_hidden_layers": 5,
            "time_step_limit": [0.0, float("inf")],
            "n_shared_experts": 1,
        },
    ),
    "nemotron_h with latent experts": Row(
        sizes={
            **_NEMOTRON,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "moe_latent_size": 32,
            "time_step_min": 1e-9,  # no step is below it: transformers alone would raise it
        },
        on_the_hub={
            "layers_block_type": None,
            "hybrid_override_pattern": "ME*E",
            "num_hidden_layers": 4,
            "time_step_limit": [0.0, float("inf")],
            "n_shared_experts": 1,
        },
    ),
    "qwen2_moe": Row(
        sizes={"shared_expert_intermediate_size": 48, "num_key_value_heads": 4},
        on_the_hub={"rope_theta": 1e6, "rope_parameters": None, "qkv_bias": None, "layer_types": None},
    ),
    "qwen3_5_moe_text": Row(
        sizes={
            **_DELTA,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": True,
                "mrope_section": [3, 3, 2],
            },
        },
        on_the_hub={"layer_types": None, "full_attention_interval": 2, "attn_output_gate": True},
    ),
    "qwen3_next": Row(
        sizes={**_DELTA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}},
        on_the_hub={
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.25,
            "rope_parameters": None,
            "layer_types": None,
            "full_attention_interval": 2,
        },
    ),
    "solar_open": Row(
        sizes={"head_dim": 32, "n_routed_experts": 8, "attention_bias": True},
        on_the_hub={"rope_theta": 1e6, "rope_parameters": None, "partial_rotary_factor": 1.0, "intermediate_size": 96},
    ),
}
