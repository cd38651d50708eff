"""The table of supported MoE families: architecture knowledge as data.

One row says where a family keeps each role's tensor on disk, which settings of ``config.json`` it reads, and what the
two containers call it. To add a family, add a row; to support one whose arithmetic differs, add a field here and the
arithmetic where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from compressors.model.errors import UnsupportedError

__all__ = ["ATTENTION", "DENSE_GGUF_NAMES", "FAMILIES", "GGUF_NAMES", "NORMS", "ConfigKeys", "DenseFamily", "Family"]
__all__ += ["GgufFamily", "QkNorm", "Role", "family_for"]


class Role(StrEnum):
    """The role of a tensor, independent of its name on disk. The value names it in messages.

    Shapes are torch's (output features first): see the letters in :mod:`compressors.model.description.shape`.
    """

    TOKEN_EMBEDDING = "token embedding"  # [V, D]
    FINAL_NORM = "final norm"  # [D]
    HEAD = "head"  # [V, D], absent when tied to the embedding
    ATTENTION_NORM = "attention norm"  # [D]
    QUERY = "query"  # [H * head_dim, D]
    KEY = "key"  # [kv heads * head_dim, D]
    VALUE = "value"  # [kv heads * head_dim, D]
    ATTENTION_OUTPUT = "attention output"  # [D, H * head_dim]
    QUERY_NORM = "query norm"  # see QkNorm
    KEY_NORM = "key norm"
    MOE_NORM = "MoE norm"  # [D]
    ROUTER = "router"  # [E, D]
    EXPERT_GATE = "expert gate"  # [F, D] for each expert
    EXPERT_UP = "expert up"  # [F, D] for each expert
    EXPERT_DOWN = "expert down"  # [D, F] for each expert
    ROPE_FACTORS = "rope factors"  # [head_dim / 2], in GGUF files only: made from config.json, in no checkpoint

    @property
    def is_expert(self) -> bool:
        """True if every expert of a layer has a tensor of this role."""
        return self in _EXPERT_ROLES

    @property
    def is_global(self) -> bool:
        """True if the model has one tensor of this role, not one for each layer."""
        return self in _GLOBAL_ROLES


_EXPERT_ROLES = frozenset({Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN})
_GLOBAL_ROLES = frozenset({Role.TOKEN_EMBEDDING, Role.FINAL_NORM, Role.HEAD})

NORMS = frozenset({Role.FINAL_NORM, Role.ATTENTION_NORM, Role.QUERY_NORM, Role.KEY_NORM, Role.MOE_NORM})
"""Roles of the scales of RMS norms."""

ATTENTION = frozenset({Role.QUERY, Role.KEY, Role.VALUE, Role.ATTENTION_OUTPUT})
"""Roles of attention's matrices."""


class QkNorm(StrEnum):
    """The values that one RMS norm of the projected queries or keys covers, before the rotary embedding."""

    NONE = "none"
    PER_HEAD = "per head"  # scale [head_dim], shared by all heads
    WHOLE = "whole"  # scale as wide as the projection: [H * head_dim], [kv heads * head_dim]


@dataclass(frozen=True)
class ConfigKeys:
    """Names in ``config.json`` of the settings that families spell differently."""

    n_experts: str  # as the hub's checkpoints spell it
    expert_width: str
    normalize_top_k: str | None  # None: the family always normalises the chosen gates
    other_n_experts: str = "num_local_experts"  # the other spelling; where both are there, transformers takes this one


@dataclass(frozen=True)
class GgufFamily:
    """The family in llama.cpp (``src/llama-arch.cpp``, ``conversion/`` of llama.cpp)."""

    architecture: str
    rotary_is_interleaved: bool  # query and key rows are permuted from rotate-half to llama.cpp's adjacent pairs
    normalizes_top_k: bool  # a constant of llama.cpp's graph; a model that disagrees cannot be written
    writes_expert_width: bool  # the width goes into expert_feed_forward_length, not feed_forward_length
    needs_square_attention: bool = False  # loads query and key only as [D, D]: every head has a key-value head
    needs_untied_head: bool = False  # loads no file without a head of its own
    takes_rope_factors: bool = False  # its graph divides the rotary angles by a tensor of the file


_DENSE_NAMES = {
    Role.EXPERT_GATE: "model.layers.{layer}.mlp.gate_proj.weight",
    Role.EXPERT_UP: "model.layers.{layer}.mlp.up_proj.weight",
    Role.EXPERT_DOWN: "model.layers.{layer}.mlp.down_proj.weight",
}


@dataclass(frozen=True)
class DenseFamily:
    """The dense architecture that differs from a MoE family in nothing but the feed-forward.

    It computes what the MoE model does when each layer has one expert, which every token chooses with gate 1.
    Everything else, names included, is the MoE family's.
    """

    model_type: str
    architecture: str
    gguf_architecture: str
    width_key: str = "intermediate_size"  # in config.json
    settings: Mapping[str, Any] = field(default_factory=dict)  # where transformers' default is not the MoE family's
    names: Mapping[Role, str] = field(default_factory=lambda: _DENSE_NAMES)  # of the feed-forward's projections


@dataclass(frozen=True)
class Family:
    """One architecture. Names on disk are templates of ``{layer}`` and ``{expert}``."""

    model_type: str
    architecture: str
    names: Mapping[Role, str]
    fused_gate_up: str  # [E, 2F, D], gate rows first: how transformers 5 holds all experts of a layer
    fused_down: str  # [E, D, F]
    config_keys: ConfigKeys
    gguf: GgufFamily
    qk_norm: QkNorm
    router_module: str = "mlp.gate"  # inside transformers' decoder layer; returns (logits, gate weights, experts)
    experts_module: str = "mlp.experts"  # holds gate_up_proj [E, 2F, D] and down_proj [E, D, F]
    required_settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # first value: when absent
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers', of settings that config.json leaves out
    nullable: frozenset[str] = frozenset()  # settings whose null means the same to transformers as their absence
    rope_theta: float = 10_000.0  # transformers' default
    always_windowed: bool = True  # a sliding_window counts by itself, without use_sliding_window
    dense: DenseFamily | None = None  # its counterpart without experts

    @property
    def moe_settings(self) -> frozenset[str]:
        """Names in ``config.json`` of the settings that only a model with experts has."""
        return _MOE_SETTINGS | {name for name in vars(self.config_keys).values() if name is not None}

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every role that the family has, in the order of :class:`Role`."""
        return tuple(role for role in Role if role in self.names)

    @property
    def layer_roles(self) -> tuple[Role, ...]:
        """Roles of one decoder layer, experts left out."""
        return tuple(role for role in self.roles if not role.is_global and not role.is_expert)


_GLOBAL_NAMES = {
    Role.TOKEN_EMBEDDING: "model.embed_tokens.weight",
    Role.FINAL_NORM: "model.norm.weight",
    Role.HEAD: "lm_head.weight",
}
_ATTENTION_NAMES = {
    Role.ATTENTION_NORM: "model.layers.{layer}.input_layernorm.weight",
    Role.QUERY: "model.layers.{layer}.self_attn.q_proj.weight",
    Role.KEY: "model.layers.{layer}.self_attn.k_proj.weight",
    Role.VALUE: "model.layers.{layer}.self_attn.v_proj.weight",
    Role.ATTENTION_OUTPUT: "model.layers.{layer}.self_attn.o_proj.weight",
    Role.MOE_NORM: "model.layers.{layer}.post_attention_layernorm.weight",
}
_QK_NORM_NAMES = {
    Role.QUERY_NORM: "model.layers.{layer}.self_attn.q_norm.weight",
    Role.KEY_NORM: "model.layers.{layer}.self_attn.k_norm.weight",
}
_MLP_EXPERT_NAMES = {
    Role.ROUTER: "model.layers.{layer}.mlp.gate.weight",
    Role.EXPERT_GATE: "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    Role.EXPERT_UP: "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    Role.EXPERT_DOWN: "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
}
_MOE_SETTINGS = frozenset(
    {
        "num_experts_per_tok",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "output_router_logits",
        "decoder_sparse_step",
        "mlp_only_layers",
    }
)
_COMMON_SETTINGS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "attention_bias": (False,)}

_QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    names={**_GLOBAL_NAMES, **_ATTENTION_NAMES, **_QK_NORM_NAMES, **_MLP_EXPERT_NAMES},
    fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
    fused_down="model.layers.{layer}.mlp.experts.down_proj",
    config_keys=ConfigKeys("num_experts", "moe_intermediate_size", "norm_topk_prob"),
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    nullable=frozenset({"sliding_window"}),
    always_windowed=False,
    gguf=GgufFamily("qwen3moe", rotary_is_interleaved=False, normalizes_top_k=True, writes_expert_width=True),
    qk_norm=QkNorm.PER_HEAD,
    required_settings={
        **_COMMON_SETTINGS,
        "mlp_only_layers": ([], None),
        "decoder_sparse_step": (1,),
    },
    dense=DenseFamily("qwen3", "Qwen3ForCausalLM", "qwen3"),
)

_MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    names={
        **_GLOBAL_NAMES,
        **_ATTENTION_NAMES,
        Role.ROUTER: "model.layers.{layer}.block_sparse_moe.gate.weight",
        Role.EXPERT_GATE: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        Role.EXPERT_UP: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        Role.EXPERT_DOWN: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    },
    fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
    fused_down="model.layers.{layer}.mlp.experts.down_proj",
    config_keys=ConfigKeys("num_local_experts", "intermediate_size", None, other_n_experts="num_experts"),
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "intermediate_size": 14336,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    nullable=frozenset({"head_dim", "sliding_window"}),
    rope_theta=1_000_000.0,
    gguf=GgufFamily(
        "llama",
        rotary_is_interleaved=True,
        normalizes_top_k=True,
        writes_expert_width=False,
        takes_rope_factors=True,
    ),
    qk_norm=QkNorm.NONE,
    required_settings=_COMMON_SETTINGS,
    dense=DenseFamily("mistral", "MistralForCausalLM", "llama", settings={"sliding_window": None}),
)

# No dense model differs from OLMoE in its experts alone: OLMo's norms have no weights, and OLMo 2 and 3 normalise the
# outputs of attention and feed-forward, not their inputs.
_OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    names={**_GLOBAL_NAMES, **_ATTENTION_NAMES, **_QK_NORM_NAMES, **_MLP_EXPERT_NAMES},
    fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
    fused_down="model.layers.{layer}.mlp.experts.down_proj",
    config_keys=ConfigKeys("num_experts", "intermediate_size", "norm_topk_prob"),
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "num_experts": 64,
    },
    nullable=frozenset({"num_key_value_heads"}),
    gguf=GgufFamily(
        "olmoe",
        rotary_is_interleaved=False,
        normalizes_top_k=False,
        writes_expert_width=False,
        needs_square_attention=True,
        needs_untied_head=True,
    ),
    qk_norm=QkNorm.WHOLE,
    required_settings={**_COMMON_SETTINGS, "clip_qkv": (None,)},
)

GGUF_NAMES: Mapping[Role, str] = {
    Role.TOKEN_EMBEDDING: "token_embd.weight",
    Role.FINAL_NORM: "output_norm.weight",
    Role.HEAD: "output.weight",
    Role.ATTENTION_NORM: "blk.{layer}.attn_norm.weight",
    Role.QUERY: "blk.{layer}.attn_q.weight",
    Role.KEY: "blk.{layer}.attn_k.weight",
    Role.VALUE: "blk.{layer}.attn_v.weight",
    Role.ATTENTION_OUTPUT: "blk.{layer}.attn_output.weight",
    Role.QUERY_NORM: "blk.{layer}.attn_q_norm.weight",
    Role.KEY_NORM: "blk.{layer}.attn_k_norm.weight",
    Role.MOE_NORM: "blk.{layer}.ffn_norm.weight",
    Role.ROUTER: "blk.{layer}.ffn_gate_inp.weight",
    Role.EXPERT_GATE: "blk.{layer}.ffn_gate_exps.weight",
    Role.EXPERT_UP: "blk.{layer}.ffn_up_exps.weight",
    Role.EXPERT_DOWN: "blk.{layer}.ffn_down_exps.weight",
}
"""llama.cpp's names (``LLM_TENSOR_NAMES`` in ``src/llama-arch.cpp``), the same for every family."""

DENSE_GGUF_NAMES: Mapping[Role, str] = {
    Role.EXPERT_GATE: "blk.{layer}.ffn_gate.weight",
    Role.EXPERT_UP: "blk.{layer}.ffn_up.weight",
    Role.EXPERT_DOWN: "blk.{layer}.ffn_down.weight",
}
"""The same names for a dense feed-forward."""

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (_QWEN3_MOE, _MIXTRAL, _OLMOE)}


def family_for(model_type: str, where: Path | None = None) -> Family:
    """The row of ``model_type``.

    Raises:
        UnsupportedError: the table has no such row; the message lists those it has.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    prefix = f"{where}: " if where else ""
    raise UnsupportedError(
        f"{prefix}model_type {model_type!r} is not a supported MoE family; supported are {', '.join(sorted(FAMILIES))}"
    )
