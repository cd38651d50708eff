"""Parts that IBM's Granite families share: fused experts, and factors of embeddings, attention, layers and logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.description.family import ConfigValues, GgufValue
from compressors.model.description.feed_forward import LostModule, Routed, Shared
from compressors.model.description.mixers import GroupedQuery, Mixer
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing, Score
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import Fused, GgufTensor, TensorSpec
from compressors.model.description.transforms import InterleaveRotary, UngroupedRows
from compressors.model.families.shared import from_gguf, llama_cpp, parts, written_config

__all__ = [
    "ATTENTION",
    "DEFAULTS",
    "EXPERTS",
    "SHARED_EXPERT",
    "attention",
    "edited",
    "experts",
    "factors",
    "factors_from_keys",
    "from_keys",
    "gguf_factors",
    "gguf_keys",
    "layer",
    "model",
    "settings",
    "shared_expert",
]

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "intermediate_size": 11008,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
"""The defaults that all classes of transformers have."""

_BLOCK, _SHARED = "block_sparse_moe", "shared_mlp"
_LAYER, _GGUF = "model.layers.{layer}.", "blk.{layer}."
_ON_DISK = f"{_LAYER}{_BLOCK}"
_HALVES = ("S", "S")  # rows of the gate and of up

ATTENTION = parts.attention_matrices(InterleaveRotary())
EXPERTS = (
    parts.router_tensor(f"{_BLOCK}.router.layer.weight", module=f"{_BLOCK}.router.weight"),
    *parts.fused_expert_tensors(Fused(f"{_ON_DISK}.input_linear.weight"), Fused(f"{_ON_DISK}.output_linear.weight")),
)
SHARED_EXPERT = (
    TensorSpec(
        Role.SHARED_GATE_UP,
        f"{_LAYER}{_SHARED}.input_linear.weight",
        ("2S", "D"),
        GgufTensor(f"{_GGUF}ffn_gate_shexp.weight", UngroupedRows(None, _HALVES, (0,))),
        gguf_rest=(GgufTensor(f"{_GGUF}ffn_up_shexp.weight", UngroupedRows(None, _HALVES, (1,))),),
    ),
    TensorSpec(
        Role.SHARED_DOWN,
        f"{_LAYER}{_SHARED}.output_linear.weight",
        ("D", "S"),
        GgufTensor(f"{_GGUF}ffn_down_shexp.weight"),
    ),
)


def experts(settings: FamilySettings, beside: Shared | None = None) -> Routed:
    """The routed experts; ``beside`` is the shared one, which lies beside their block, if there is one."""
    n_experts = settings.count("num_local_experts")
    return Routed(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts),
        width=settings.count("intermediate_size"),
        routing=Routing(Score.LOGITS),
        shared=beside,
        experts_module=f"{_BLOCK}.experts",
        block=(LostModule(_BLOCK), *(() if beside is None else (LostModule(_SHARED),))),
    )


def attention(settings: FamilySettings) -> GroupedQuery:
    """Attention, whose products have a factor of their own."""
    return parts.attention(settings, scale=settings.number("attention_multiplier"))


def layer(settings: FamilySettings, mixer: Mixer, of_mixer: Sequence[TensorSpec], feed_forward: Routed) -> LayerSpec:
    """A layer with experts.

    Args:
        settings: the family's settings.
        mixer: the part that lets positions look at earlier ones.
        of_mixer: its tensors.
        feed_forward: the experts.
    """
    beside = () if feed_forward.shared is None else SHARED_EXPERT
    tensors = (*parts.norms(), *of_mixer, *EXPERTS, *beside)
    residual_scale = settings.number("residual_multiplier")
    return parts.layer(settings, mixer, feed_forward, tensors, residual_scale=residual_scale)


def model(settings: FamilySettings, layers: Sequence[LayerSpec]) -> ModelSpec:
    """A model of these layers."""
    return parts.model(
        settings,
        layers,
        embedding_scale=settings.number("embedding_multiplier"),
        logit_divisor=settings.number("logits_scaling"),
    )


def shared_expert(spec: ModelSpec) -> Shared | None:
    """The shared expert of all layers; None: there is none."""
    return parts.routed(spec).shared


def factors(spec: ModelSpec) -> dict[str, float]:
    """The settings of the factors."""
    return {
        "embedding_multiplier": spec.embedding_scale,
        "attention_multiplier": parts.grouped_query(spec).scale,
        "residual_multiplier": _residual_scale(spec),
        "logits_scaling": spec.logit_divisor,
    }


def settings(spec: ModelSpec) -> ConfigValues:
    """The settings of ``config.json`` that describe a model, by key, except those of a kind of mixer."""
    usual = written_config.usual_settings(
        spec, n_experts="num_local_experts", width="intermediate_size", normalizes=None
    )
    return usual | factors(spec)


def edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    """A ``config.json`` with a student's counts."""
    return written_config.moe_edited(spec, config, "num_local_experts", "intermediate_size", "num_experts_per_tok")


def gguf_factors(spec: ModelSpec) -> dict[str, GgufValue]:
    """The keys of the factors."""
    return {
        "attention.scale": parts.grouped_query(spec).scale,
        "embedding_scale": spec.embedding_scale,
        "residual_scale": _residual_scale(spec),
        "logit_scale": spec.logit_divisor,
    }


def gguf_keys(spec: ModelSpec) -> dict[str, GgufValue]:
    """The keys of a model whose layers are equal."""
    return llama_cpp.usual_keys(spec) | gguf_factors(spec)


def from_keys(keys: GgufKeys) -> dict[str, Any]:
    """The settings of a model whose layers are equal, made of a file's keys: the inverse of :func:`gguf_keys`."""
    usual = from_gguf.usual_settings(
        keys, n_experts="num_local_experts", width="intermediate_size", width_key="feed_forward_length"
    )
    return usual | factors_from_keys(keys)


def factors_from_keys(keys: GgufKeys) -> dict[str, float]:
    """The settings of the factors, made of a file's keys: the inverse of :func:`gguf_factors`."""
    return {
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "attention_multiplier": keys.number("attention.scale", from_gguf.head_dim(keys) ** -0.5),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "logits_scaling": keys.number("logit_scale"),
    }


def _residual_scale(spec: ModelSpec) -> float:
    (scale,) = {layer.residual_scale for layer in spec.layers}
    return scale
