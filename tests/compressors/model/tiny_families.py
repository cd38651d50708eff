"""Tiny random models of transformers' MoE families, by ``model_type``, supported or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedConfig

__all__ = ["tiny_config", "tiny_model"]

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "moe_shared_expert_intermediate_size": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "num_experts_per_token": 3,
    "top_k_experts": 3,
    "moe_topk": 3,
    "moe_k": 3,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Families spell the same sizes differently; each takes those that its class has."""


def tiny_config(model_type: str, **settings: Any) -> PreTrainedConfig:
    """The family's configuration with small sizes; ``settings`` go before these."""
    config_class = CONFIG_MAPPING[model_type]
    known = set(dir(config_class())) - set(config_class.attribute_map)
    sizes = {key: size for key, size in _SIZES.items() if key in known}
    config: PreTrainedConfig = config_class(**sizes | settings)
    config._attn_implementation = "eager"
    return config


def tiny_model(model_type: str, **settings: Any) -> nn.Module:
    """A model in float32 whose every parameter and buffer that a checkpoint holds is random, biases included."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **settings)
    has_head = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    model: nn.Module = (AutoModelForCausalLM if has_head else AutoModel).from_config(config).float().eval()
    with torch.no_grad():
        for values in model.state_dict().values():
            if values.is_floating_point():
                values.normal_(0, 0.4)
    return model
