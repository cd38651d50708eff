"""Parts that the families with latent attention share: DeepSeek's, and GLM-4.7-Flash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.rope_settings import RopeRule
from compressors.model.description.family import ConfigValues, GgufValue, SkippedPart
from compressors.model.description.feed_forward import Dense, Routed, Shared
from compressors.model.description.mixers import Latent
from compressors.model.description.roles import Role
from compressors.model.description.routing import GroupScore, Routing, Score
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import GgufTensor, TensorSpec
from compressors.model.description.transforms import HeadMatrices
from compressors.model.errors import InputError
from compressors.model.families.shared import parts, written_config

__all__ = [
    "MTP",
    "ROPE",
    "biased_sigmoid_experts",
    "edited",
    "gguf_keys",
    "gguf_refusal",
    "leading_dense",
    "mixer_tensors",
    "model",
    "n_dense",
    "settings",
    "with_groups",
]

MTP = SkippedPart(r"model\.layers\.(?P<layer>\d+)\..*", "layers for predicting several tokens at once (MTP)")

ROPE = RopeRule(scales_attention=True, interleaved=True)
"""How the classes read the rotary embedding."""

_INNER_EPSILON = 1e-6
"""Epsilon of the norms inside attention: transformers' classes make them without rms_norm_eps."""

_LARGEST_EPSILON = 1.1e-5
"""llama.cpp makes those norms with rms_norm_eps, too: up to 1e-5, as GLM has it, logits differ by about 1e-4."""

_SOFTMAX, _SIGMOID = 1, 2  # enum llama_expert_gating_func_type in llama.cpp's src/llama-hparams.h


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
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_bias", False)
    settings.require("rope_interleave", True)
    settings.require("scoring_func", "sigmoid")
    settings.require("topk_method", "noaux_tc")
    settings.require("head_dim", settings.count("qk_rope_head_dim"))  # the rotary embedding takes it from there
    settings.ignore("num_nextn_predict_layers", "pretraining_tp")
    settings.refuse_what_no_family_can_do()
    n_experts = settings.count_of("num_local_experts", "n_routed_experts")
    top_k, width = settings.top_k(n_experts), settings.count("moe_intermediate_size")
    routing = Routing(
        Score.SIGMOID,
        has_selection_bias=True,
        group_score=GroupScore.BEST_TWO,
        normalizes=settings.flag("norm_topk_prob", default=True),
        epsilon=1e-20,
        scale=settings.number("routed_scaling_factor"),
    )
    return parts.routed_in_mlp(
        n_experts=n_experts,
        top_k=top_k,
        width=width,
        routing=with_groups(settings, routing, n_experts, top_k),
        shared=Shared(width * settings.count("n_shared_experts")),
    )


def with_groups(settings: FamilySettings, routing: Routing, n_experts: int, top_k: int) -> Routing:
    """The rule with the groups of experts that it chooses first.

    Raises:
        InputError: transformers' class cannot choose from such groups, or leaves some of a token's experts to chance.
    """
    n_groups, n_chosen = settings.count("n_group"), settings.count("topk_group")
    size, rest = divmod(n_experts, n_groups)
    why = None
    if rest:
        why = f"n_group is {n_groups}, which does not divide the {n_experts} experts of n_routed_experts"
    elif n_chosen > n_groups:
        why = f"topk_group is {n_chosen}, more than n_group, {n_groups}"
    elif size < routing.group_score.n_best:
        why = f"n_group is {n_groups}: with {n_experts} experts (n_routed_experts) a group has no {routing.group_score}"
    elif n_chosen * size < top_k:
        why = f"topk_group is {n_chosen}: so many groups have fewer experts than num_experts_per_tok, {top_k}"
    if why is not None:
        raise InputError(f"{settings.settings.path}: {why}")
    return replace(routing, n_groups=n_groups, n_chosen_groups=n_chosen)


def leading_dense(settings: FamilySettings) -> list[bool]:
    """Says of each layer whether it is dense, as the first ones are."""
    n_dense = settings.whole_number("first_k_dense_replace")
    return [index < n_dense for index in range(settings.count("num_hidden_layers"))]


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
    parts.refuse_without_experts(settings, are_dense, said_by)
    mixer = _attention(settings, rope_rule)
    of_mixer = mixer_tensors(mixer)
    of_experts = (
        parts.router_tensor(),
        *((parts.selection_bias_tensor(),) if experts.routing.has_selection_bias else ()),
        *parts.expert_tensors(),
        *parts.shared_expert_tensors("mlp.shared_experts"),
    )
    feed_forward = Dense(settings.count("intermediate_size"))
    dense = parts.layer(settings, mixer, feed_forward, (*of_mixer, *parts.leading_dense_tensors()))
    routed = parts.layer(settings, mixer, experts, (*of_mixer, *of_experts))
    return parts.model(settings, [dense if is_dense else routed for is_dense in are_dense])


def n_dense(spec: ModelSpec) -> int:
    """The number of dense layers."""
    return sum(isinstance(layer.feed_forward, Dense) for layer in spec.layers)


def edited(spec: ModelSpec, config: ConfigValues, dense_layers: str, *absent: str) -> dict[str, Any]:
    """A ``config.json`` with a student's counts.

    Args:
        spec: the student.
        config: the source's settings.
        dense_layers: the setting that says which layers are dense.
        absent: other spellings, which are dropped.
    """
    counts = ("n_routed_experts", "moe_intermediate_size", "n_shared_experts", "num_experts_per_tok")
    others = {key: value for key, value in config.items() if key not in absent}
    return written_config.moe_edited(spec, others, *counts, dense_layers)


def settings(spec: ModelSpec) -> dict[str, Any]:
    """The settings of ``config.json`` that describe a model, by key."""
    mixer = spec.layers[0].mixer
    routed = next(layer.routed for layer in spec.layers if layer.routed is not None)
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
        "n_routed_experts": routed.n_experts,
        "num_experts_per_tok": routed.top_k,
        "moe_intermediate_size": routed.width,
        "n_shared_experts": written_config.n_shared_experts(spec),
        "routed_scaling_factor": routed.routing.scale,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": spec.rms_norm_eps,
    }
    dense = next((layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, Dense)), None)
    return found if dense is None else found | {"intermediate_size": dense.width}


def gguf_keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    """The keys of llama.cpp's deepseek2, which keeps one vector for all heads (multi-query attention).

    ``src/models/deepseek2.cpp``; a query rank of 0 stands for none, and only models of some numbers of layers may leave
    it out. Without a rule for scores the graph takes softmax, so that it is always written.
    """
    mixer = spec.layers[0].mixer
    routed = next(layer.routed for layer in spec.layers if layer.routed is not None)
    assert isinstance(mixer, Latent) and routed.shared is not None
    dense = next((layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, Dense)), None)
    rule = routed.routing
    keys: dict[str, GgufValue] = {
        "block_count": spec.n_layers,
        "context_length": spec.context_length,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": routed.width if dense is None else dense.width,
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
        "expert_count": routed.n_experts,
        "expert_used_count": routed.top_k,
        "expert_feed_forward_length": routed.width,
        "expert_shared_count": routed.shared.width // routed.width,
        "expert_weights_scale": rule.scale,
        "expert_weights_norm": rule.normalizes,
        "expert_gating_func": _SIGMOID if rule.score is Score.SIGMOID else _SOFTMAX,
        "leading_dense_block_count": n_dense(spec),
        "vocab_size": spec.vocab_size,
    }
    if rule.n_chosen_groups < rule.n_groups:
        keys |= {"expert_group_count": rule.n_groups, "expert_group_used_count": rule.n_chosen_groups}
    return keys


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
    return None


def _is_lite(spec: ModelSpec) -> bool:
    """``is_lite`` in ``src/models/deepseek2.cpp``."""
    return spec.n_layers in (26, 27) or (spec.n_layers == 48 and spec.vocab_size == 128256)
