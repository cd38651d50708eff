"""Parts that the families with latent attention share: DeepSeek's, and GLM-4.7-Flash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.gguf_rope_settings import rope_settings
from compressors.model.config.rope_settings import RopeRule
from compressors.model.description.family import GgufValue
from compressors.model.description.feed_forward import Routed
from compressors.model.description.mixers import Latent
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import GgufTensor, TensorSpec
from compressors.model.description.transforms import HeadMatrices
from compressors.model.errors import InputError
from compressors.model.families.shared import expert_layers, from_gguf, llama_cpp, parts

__all__ = [
    "ROPE",
    "absent_keys",
    "biased_sigmoid_experts",
    "from_keys",
    "function_of",
    "gguf_keys",
    "gguf_refusal",
    "mixer_tensors",
    "model",
    "settings",
]

ROPE = RopeRule(scales_attention=True, interleaved=True)
"""How the classes read the rotary embedding."""

_INNER_EPSILON = 1e-6
"""Epsilon of the norms inside attention: transformers' classes make them without rms_norm_eps."""

_LARGEST_EPSILON = 1.1e-5
"""llama.cpp makes those norms with rms_norm_eps, too: up to 1e-5, as GLM has it, logits differ by about 1e-4."""


def _attention(settings: FamilySettings, rope_rule: RopeRule) -> Latent:
    """Reads the mixer."""
    plain_dim, rotary_dim = settings.count("qk_nope_head_dim"), settings.count("qk_rope_head_dim")
    rope = settings.rope(rotary_dim, rope_rule)
    if rope.width != rotary_dim:
        raise InputError(
            f"{settings.settings.path}: partial_rotary_factor is {rope.share:g}, but this family turns all of "
            "qk_rope_head_dim, so transformers cannot run such a model either"
        )
    return Latent(
        n_heads=_n_heads(settings),
        query_rank=settings.count_or_null("q_lora_rank"),
        rank=settings.count("kv_lora_rank"),
        plain_dim=plain_dim,
        rotary_dim=rotary_dim,
        value_dim=settings.count("v_head_dim"),
        rope=rope,
        scale=rope.attention_scale(1 / math.sqrt(plain_dim + rotary_dim)),
        inner_epsilon=_INNER_EPSILON,
    )


def _n_heads(settings: FamilySettings) -> int:
    """The number of heads, which all have keys of their own; transformers' classes still repeat these for groups."""
    n_heads = settings.count("num_attention_heads")
    n_kv_heads = settings.count_or_null("num_key_value_heads") or n_heads
    settings.settings.note("num_key_value_heads", n_kv_heads)
    if n_heads // n_kv_heads != 1:
        raise InputError(
            f"{settings.settings.path}: num_key_value_heads is {n_kv_heads}, but each of the {n_heads} heads of "
            "num_attention_heads has keys of its own, so transformers cannot run such a model either"
        )
    return n_heads


def mixer_tensors(mixer: Latent) -> tuple[TensorSpec, ...]:
    """The tensors of the mixer, and the norm in front of the feed-forward."""
    attention, gguf = "model.layers.{layer}.self_attn.", "blk.{layer}.attn_"
    output = TensorSpec(
        Role.ATTENTION_OUTPUT, f"{attention}o_proj.weight", ("D", "O"), GgufTensor(f"{gguf}output.weight")
    )
    keys_values = (
        TensorSpec(
            Role.KEY_VALUE_A,
            f"{attention}kv_a_proj_with_mqa.weight",
            ("R", "D"),
            GgufTensor(f"{gguf}kv_a_mqa.weight"),
            shares_input_of=Role.QUERY if mixer.query_rank is None else Role.QUERY_A,
        ),
        parts.norm(Role.KEY_VALUE_A_NORM, f"{attention}kv_a_layernorm.weight", ("C",), f"{gguf}kv_a_norm.weight"),
        TensorSpec(
            Role.KEY_VALUE_B,
            f"{attention}kv_b_proj.weight",
            ("U", "C"),
            GgufTensor(f"{gguf}k_b.weight", HeadMatrices("H", ("p", "v"), 0, is_transposed=True)),
            gguf_rest=(GgufTensor(f"{gguf}v_b.weight", HeadMatrices("H", ("p", "v"), 1)),),
        ),
    )
    return (*parts.norms(), *_query_tensors(mixer), *keys_values, output)


def _query_tensors(mixer: Latent) -> tuple[TensorSpec, ...]:
    attention, gguf = "model.layers.{layer}.self_attn.", "blk.{layer}.attn_"
    if mixer.query_rank is None:
        return (TensorSpec(Role.QUERY, f"{attention}q_proj.weight", ("Q", "D"), GgufTensor(f"{gguf}q.weight")),)
    return (
        TensorSpec(Role.QUERY_A, f"{attention}q_a_proj.weight", ("A", "D"), GgufTensor(f"{gguf}q_a.weight")),
        parts.norm(Role.QUERY_A_NORM, f"{attention}q_a_layernorm.weight", ("A",), f"{gguf}q_a_norm.weight"),
        TensorSpec(Role.QUERY_B, f"{attention}q_b_proj.weight", ("Q", "A"), GgufTensor(f"{gguf}q_b.weight")),
    )


def biased_sigmoid_experts(settings: FamilySettings) -> Routed:
    """Reads the experts of DeepSeek-V3's block, and refuses what its class could not compute."""
    settings.require("attention_bias", False)
    settings.require("rope_interleave", True)
    settings.require("head_dim", settings.count("qk_rope_head_dim"))  # the rotary embedding takes it from there
    settings.ignore("num_nextn_predict_layers", "pretraining_tp")
    settings.refuse_what_no_family_can_do()
    return expert_layers.biased_sigmoid_experts(settings)


def model(
    settings: FamilySettings,
    experts: Routed,
    are_dense: Sequence[bool],
    said_by: str,
    rope_rule: RopeRule = ROPE,
) -> ModelSpec:
    """A model of which some layers are dense.

    Args:
        settings: the family's settings.
        experts: the feed-forward of the other layers.
        are_dense: says of each layer whether it is dense.
        said_by: the setting that says so.
        rope_rule: how the family's class reads the rotary embedding.
    """
    mixer = _attention(settings, rope_rule)
    bias = parts.selection_bias_tensor() if experts.routing.has_selection_bias else None
    of_experts, mixers = expert_layers.tensors(bias), [mixer] * len(are_dense)
    layers = expert_layers.layers(settings, mixers, mixer_tensors(mixer), experts, of_experts, are_dense, said_by)
    return parts.model(settings, layers)


def settings(spec: ModelSpec) -> dict[str, Any]:
    """The settings of ``config.json`` that describe a model, by key."""
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, Latent)
    found: dict[str, Any] = {
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": mixer.n_heads,
        "q_lora_rank": mixer.query_rank,
        "kv_lora_rank": mixer.rank,
        "qk_nope_head_dim": mixer.plain_dim,
        "qk_rope_head_dim": mixer.rotary_dim,
        "v_head_dim": mixer.value_dim,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": spec.rms_norm_eps,
    }
    return found | expert_layers.settings(spec)


def gguf_keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    """The keys of llama.cpp's deepseek2, which keeps one vector for all heads (multi-query attention).

    ``src/models/deepseek2.cpp``; a query rank of 0 stands for none, and only models of some numbers of layers may leave
    it out. Without a rule for scores the graph takes softmax, so that it is always written.
    """
    mixer, feed_forward = spec.layers[0].mixer, spec.layers[0].feed_forward
    assert isinstance(mixer, Latent) and feed_forward is not None
    keys: dict[str, GgufValue] = {
        **llama_cpp.block_count(spec),
        "context_length": spec.context_length,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": feed_forward.width,
        "attention.head_count": mixer.n_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": spec.rms_norm_eps,
        "attention.q_lora_rank": mixer.query_rank or 0,
        "attention.kv_lora_rank": mixer.rank,
        "attention.key_length": mixer.rank + mixer.rotary_dim,
        "attention.value_length": mixer.rank,
        "attention.key_length_mla": mixer.key_dim,
        "attention.value_length_mla": mixer.value_dim,
        "rope.freq_base": mixer.rope.theta,
        "rope.dimension_count": mixer.rotary_dim,
    }
    return keys | expert_layers.gguf_keys(spec) | {"vocab_size": spec.vocab_size}


def from_keys(keys: GgufKeys) -> dict[str, Any]:
    """The settings of a model, made of a file's keys: the inverse of :func:`gguf_keys`."""
    n_heads, rotary_dim = keys.count("attention.head_count"), keys.count("rope.dimension_count")
    return {
        **from_gguf.model_settings(keys),
        **rope_settings(keys, rotary_dim),
        **expert_layers.from_keys(keys),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads,
        "q_lora_rank": keys.count("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": keys.count("attention.kv_lora_rank"),
        "qk_nope_head_dim": keys.count("attention.key_length_mla") - rotary_dim,
        "qk_rope_head_dim": rotary_dim,
        "v_head_dim": keys.count("attention.value_length_mla"),
        "n_routed_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"),
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "first_k_dense_replace": keys.count("leading_dense_block_count", 0),
    }


def absent_keys(spec: ModelSpec) -> dict[str, GgufValue]:
    """llama.cpp's values of keys that a file leaves out."""
    found = {"attention.q_lora_rank": 0, "expert_gating_func": _usual_function(spec.n_layers, spec.vocab_size)}
    return expert_layers.absent_keys(spec) | found


def function_of(keys: GgufKeys) -> int:
    """The function of scores that a file says, or that llama.cpp takes where it says none."""
    n_layers, (n_tokens, *_) = from_gguf.n_layers(keys), keys.shapes.get("token_embd.weight", (0,))
    return keys.count("expert_gating_func", _usual_function(n_layers, n_tokens))


def _usual_function(n_layers: int, vocab_size: int) -> int:
    is_flash = n_layers in (47, 48) and vocab_size == 154880  # GLM-4.7-Flash
    return from_gguf.SIGMOID if is_flash else from_gguf.SOFTMAX


def gguf_refusal(spec: ModelSpec) -> str | None:
    """Says which part of a model llama.cpp's deepseek2 cannot compute."""
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, Latent)
    if mixer.query_rank is not None and _is_lite(spec):
        return (
            f"graph takes a model of {spec.n_layers} layers for a lite one, whose queries are made from the hidden "
            "state; this model's are made from a vector of q_lora_rank values"
        )
    if spec.rms_norm_eps > _LARGEST_EPSILON:
        return (
            f"graph makes the norms inside attention with rms_norm_eps, {spec.rms_norm_eps:g}, but the model's have "
            f"{mixer.inner_epsilon:g}"
        )
    if spec.mtp is not None and mixer.query_rank is None:
        return "graph of an MTP layer makes queries from a vector of q_lora_rank values, which this model has not"
    return None


def _is_lite(spec: ModelSpec) -> bool:
    """``is_lite`` in ``src/models/deepseek2.cpp``."""
    return spec.n_layers in (26, 27) or (spec.n_layers == 48 and spec.vocab_size == 128256)
