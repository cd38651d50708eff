"""Nemotron-H MoE: blocks of one part each: Mamba-2, attention without positions, or experts without a gate.

A shared expert stands beside the routed ones; both square a ReLU. In Nemotron 3 Super the routed ones have a space of
their own, narrower than the hidden state, between two matrices. The steps of Mamba-2's heads have no lower limit, as in
NVIDIA's code and in llama.cpp; transformers raises them to ``time_step_min``, which counts where a step is below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue, SkippedPart
from compressors.model.description.feed_forward import Dense, LostModule, Routed, Shared
from compressors.model.description.glu import Activation, Glu
from compressors.model.description.mixers import GroupedQuery, Mamba2, NoMixer
from compressors.model.description.mtp import MTP_PART
from compressors.model.description.roles import Role
from compressors.model.description.routing import GroupScore, Routing, Score
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import Fused, GgufTensor, TensorSpec
from compressors.model.description.transforms import InterleaveRotary
from compressors.model.errors import InputError
from compressors.model.families.shared import expert_layers, from_gguf, mamba2, parts, written_config
from compressors.model.names import shown

__all__ = ["FAMILY"]

_LATENT_SIZE = "moe_latent_size"  # a setting, and a key in GGUF

_DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "layer_norm_epsilon": 1e-5,
    "intermediate_size": 21504,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "conv_kernel": 4,
    "n_routed_experts": 8,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    _LATENT_SIZE: None,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
_RECURRENT, _EXPERTS, _ATTENDING, _DENSE = "linear_attention", "moe", "full_attention", "mlp"
_LETTERS = {"M": _RECURRENT, "E": _EXPERTS, "*": _ATTENDING, "-": _DENSE}
"""The kinds of blocks as the hub's pattern has them, and as transformers 5 lists them."""
_OLDER = {"mamba": _RECURRENT, "attention": _ATTENDING}
_PATTERN, _LIST = "hybrid_override_pattern", "layers_block_type"
_USUAL_KINDS = (_RECURRENT, _EXPERTS, _ATTENDING, _DENSE)  # transformers' default

_BLOCK, _GGUF = "backbone.layers.{layer}.", "blk.{layer}."
_MIXER = f"{_BLOCK}mixer."
_GLU = Glu(Activation.RELU_SQUARED, is_gated=False)


def _norm(role: Role) -> TensorSpec:
    """The norm in front of a block, which has one name whatever follows."""
    return parts.norm(role, f"{_BLOCK}norm.weight", ("D",), f"{_GGUF}attn_norm.weight")


def _neurons(up: Role, down: Role, module: str, width: str, gguf: str) -> tuple[TensorSpec, ...]:
    """The matrices of a feed-forward without a gate.

    Args:
        up: the role of the matrix that its input is multiplied with.
        down: the role of the other one.
        module: the beginning of their names, inside of the block's part.
        width: the letter of the number of neurons.
        gguf: the end of their names in GGUF.
    """
    shapes = {up: ("up", (width, "D")), down: ("down", ("D", width))}
    return tuple(
        TensorSpec(role, f"{_MIXER}{module}{name}_proj.weight", shape, GgufTensor(f"{_GGUF}ffn_{name}{gguf}.weight"))
        for role, (name, shape) in shapes.items()
    )


def _fused(tensor: TensorSpec) -> TensorSpec:
    return replace(tensor, fused=Fused(tensor.name.replace(".{expert}.", ".").removesuffix(".weight")))


def _in_block(tensor: TensorSpec) -> TensorSpec:
    return replace(tensor, name=_MIXER + tensor.name.rpartition("self_attn.")[2])


# llama.cpp's converter permutes queries and keys alike, although nothing turns them
_ATTENTION_TENSORS = (
    _norm(Role.ATTENTION_NORM),
    *map(_in_block, parts.attention_matrices(InterleaveRotary())),
)
_EXPERT_TENSORS = (
    _norm(Role.MOE_NORM),
    replace(parts.router_tensor(), name=f"{_MIXER}gate.weight", module="mixer.gate.weight"),
    replace(parts.selection_bias_tensor(), name=f"{_MIXER}gate.e_score_correction_bias"),
    *map(_fused, _neurons(Role.EXPERT_UP, Role.EXPERT_DOWN, "experts.{expert}.", "F", "_exps")),
    *_neurons(Role.SHARED_UP, Role.SHARED_DOWN, "shared_experts.", "S", "_shexp"),
)
_IN_LATENT = {"D": "I"}
_LATENT_TENSORS = (
    TensorSpec(
        Role.EXPERTS_INPUT,
        f"{_MIXER}fc1_latent_proj.weight",
        ("I", "D"),
        GgufTensor(f"{_GGUF}ffn_latent_down.weight"),
        shares_input_of=Role.SHARED_UP,
    ),
    TensorSpec(
        Role.EXPERTS_OUTPUT, f"{_MIXER}fc2_latent_proj.weight", ("D", "I"), GgufTensor(f"{_GGUF}ffn_latent_up.weight")
    ),
    *(
        replace(tensor, shape=tuple(_IN_LATENT.get(letter, letter) for letter in tensor.shape))
        if tensor.is_per_expert
        else tensor
        for tensor in _EXPERT_TENSORS
    ),
)
"""The tensors of experts in a space of their own."""
_DENSE_TENSORS = (_norm(Role.MOE_NORM), *_neurons(Role.DENSE_UP, Role.DENSE_DOWN, "", "F", ""))
_OUTSIDE = {
    Role.TOKEN_EMBEDDING: ("backbone.embeddings.weight", "model.embeddings.weight"),
    Role.FINAL_NORM: ("backbone.norm_f.weight", "model.norm_f.weight"),
}
"""The names on the hub, and in transformers."""


_WITHOUT_EFFECT = (
    *("num_hidden_layers", "num_logits_to_keep", "mtp_layers_block_type", "num_nextn_predict_layers"),
    *("chunk_size", "expand", "mamba_proj_bias", "mamba_ssm_cache_dtype", "use_mamba_kernels"),
    *("time_step_min", "time_step_max", "time_step_floor"),
    *("n_shared_experts", "moe_shared_expert_overlap", "hidden_dropout"),
    *("residual_in_fp32", "rescale_prenorm_residual"),
)
"""Settings that transformers' class does not read, or that serve training, other kernels, or a skipped part."""
_OF_KIND = {
    _DENSE: ("intermediate_size",),
    _RECURRENT: ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
}
"""Settings that only blocks of a kind have."""


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    settings.require("mlp_hidden_act", "relu2")
    settings.require("mamba_hidden_act", "silu", "swish")
    for key in ("attention_bias", "mlp_bias", "use_bias"):
        settings.require(key, False)
    settings.require("sliding_window", None)
    settings.refuse_what_no_family_can_do(kinds=_USUAL_KINDS)
    mamba2.refuse_limits_of_steps(settings)
    settings.ignore(*_WITHOUT_EFFECT)
    kinds = _kinds(settings)
    parts.refuse_without_experts(settings, [kind != _EXPERTS for kind in kinds], _PATTERN)
    settings.ignore(*(key for kind, keys in _OF_KIND.items() if kind not in kinds for key in keys))
    layers = {kind: _layer(settings, kind) for kind in dict.fromkeys(kinds)}
    spec = parts.model(settings, [layers[kind] for kind in kinds], epsilon="layer_norm_epsilon")
    return replace(spec, tensors=tuple(map(_renamed, spec.tensors)))


def _renamed(tensor: TensorSpec) -> TensorSpec:
    if tensor.role not in _OUTSIDE:
        return tensor
    name, module = _OUTSIDE[tensor.role]
    return replace(tensor, name=name, module=module)


def _kinds(settings: FamilySettings) -> Sequence[str]:
    """The kind of each block, as transformers 5 names it.

    Raises:
        InputError: there are other kinds, or no block attends.
    """
    found, pattern = settings.settings.get(_LIST), settings.settings.get(_PATTERN)
    settings.ignore(_PATTERN)
    if found is None and pattern is not None:
        is_text = isinstance(pattern, str)
        kinds = [_LETTERS.get(letter, letter) for letter in pattern] if is_text else pattern
        key, said = _PATTERN, pattern
    else:
        kinds = list(_USUAL_KINDS) if found is None else [_OLDER.get(kind, kind) for kind in found]
        key, said = _LIST, found
    if not isinstance(kinds, list) or _ATTENDING not in kinds or not set(kinds) <= set(_USUAL_KINDS):
        raise InputError(
            f"{settings.settings.named(key)} is {shown(said)}; it must name a kind for each block "
            f"({', '.join(_LETTERS)} in {_PATTERN}, {', '.join(_USUAL_KINDS)} in {_LIST}), and some block must attend"
        )
    settings.settings.note(_LIST, kinds)
    return kinds


def _layer(settings: FamilySettings, kind: str) -> LayerSpec:
    if kind == _EXPERTS:
        experts = _experts(settings)
        tensors = _EXPERT_TENSORS if experts.latent_size is None else _LATENT_TENSORS
        return parts.layer(settings, NoMixer(), experts, tensors)
    if kind == _DENSE:
        dense = Dense(settings.count("intermediate_size"), _GLU)
        return parts.layer(settings, NoMixer(), dense, _DENSE_TENSORS)
    if kind == _ATTENDING:
        return parts.layer(settings, _attention(settings), None, _ATTENTION_TENSORS)
    has_bias = settings.flag("use_conv_bias", default=True)
    tensors = (_norm(Role.ATTENTION_NORM), *mamba2.tensors(_MIXER, has_bias=has_bias))
    return parts.layer(settings, _mamba(settings), None, tensors)


def _attention(settings: FamilySettings) -> GroupedQuery:
    """Attention that turns nothing."""
    n_heads, n_kv_heads, head_dim = settings.heads()
    return GroupedQuery(n_heads, n_kv_heads, head_dim, rope=None, scale=1 / math.sqrt(head_dim))


def _mamba(settings: FamilySettings) -> Mamba2:
    return mamba2.mixer(
        settings,
        heads="mamba_num_heads",
        groups="n_groups",
        head_dim=settings.count("mamba_head_dim"),
        head_dim_key="mamba_head_dim",
        state="ssm_state_size",
        kernel="conv_kernel",
    )


def _experts(settings: FamilySettings) -> Routed:
    n_experts = settings.count_of("num_local_experts", "n_routed_experts")
    top_k = settings.top_k(n_experts)
    routing = Routing(
        Score.SIGMOID,
        has_selection_bias=True,
        group_score=GroupScore.BEST_TWO,
        normalizes=settings.flag("norm_topk_prob", default=True),
        epsilon=1e-20,
        scale=settings.number("routed_scaling_factor"),
    )
    return Routed(
        n_experts=n_experts,
        top_k=top_k,
        width=settings.count("moe_intermediate_size"),
        routing=expert_layers.with_groups(settings, routing, n_experts, top_k),
        glu=_GLU,
        shared=Shared(settings.count("moe_shared_expert_intermediate_size")),
        experts_module="mixer.experts",
        block=(LostModule("mixer"),),
        latent_size=settings.count_or_null(_LATENT_SIZE),
    )


def _kind_letter(layer: LayerSpec) -> str:
    if isinstance(layer.mixer, Mamba2):
        return "M"
    if isinstance(layer.mixer, GroupedQuery):
        return "*"
    return "-" if isinstance(layer.feed_forward, Dense) else "E"


def _shared_width(spec: ModelSpec) -> int:
    shared = parts.routed(spec).shared
    assert shared is not None
    return shared.width


def _settings(spec: ModelSpec) -> ConfigValues:
    attention, routed = parts.grouped_query(spec), parts.routed(spec)
    found: dict[str, Any] = {
        "hidden_size": spec.hidden_size,
        _PATTERN: "".join(map(_kind_letter, spec.layers)),
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "n_routed_experts": spec.n_experts,
        "num_experts_per_tok": spec.top_k,
        "moe_intermediate_size": spec.expert_width,
        "moe_shared_expert_intermediate_size": _shared_width(spec),
        "routed_scaling_factor": routed.routing.scale,
        "norm_topk_prob": routed.routing.normalizes,
        "vocab_size": spec.vocab_size,
        "layer_norm_epsilon": spec.rms_norm_eps,
    }
    if routed.latent_size is not None:
        found[_LATENT_SIZE] = routed.latent_size
    for mixer in dict.fromkeys(layer.mixer for layer in spec.layers if isinstance(layer.mixer, Mamba2)):
        found |= {
            "mamba_num_heads": mixer.n_heads,
            "mamba_head_dim": mixer.head_dim,
            "n_groups": mixer.n_groups,
            "ssm_state_size": mixer.key_dim,
            "conv_kernel": mixer.kernel,
        }
    return found | written_config.dense_width(spec)


_GONE = (_LIST, "layer_types", "mtp_layers_block_type", "mtp_hybrid_override_pattern", "num_nextn_predict_layers")
"""Settings that a student's pattern replaces, or whose part a student lacks."""


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    counts = ("n_routed_experts", "moe_intermediate_size", "num_experts_per_tok", _PATTERN)
    others = {key: value for key, value in config.items() if key not in _GONE}
    return written_config.moe_edited(spec, others, *counts, other_spelling="num_local_experts")


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    """The keys; a block without key-value heads and without a width is one of Mamba-2."""
    attention, routed = parts.grouped_query(spec), parts.routed(spec)
    keys: dict[str, GgufValue] = {
        "block_count": spec.n_layers,
        "context_length": spec.context_length,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": tuple(
            0 if layer.feed_forward is None else layer.feed_forward.width for layer in spec.layers
        ),
        "attention.head_count": attention.n_heads,
        "attention.head_count_kv": mamba2.head_counts(spec),
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": spec.rms_norm_eps,
        "attention.layer_norm_epsilon": spec.rms_norm_eps,
        "expert_count": routed.n_experts,
        "expert_used_count": routed.top_k,
        "expert_feed_forward_length": routed.width,
        "expert_shared_feed_forward_length": _shared_width(spec),
        "expert_shared_count": 1,
        "expert_weights_scale": routed.routing.scale,
        "expert_weights_norm": routed.routing.normalizes,
        **mamba2.gguf_keys(spec),
        "vocab_size": spec.vocab_size,
    }
    if routed.latent_size is not None:
        keys[_LATENT_SIZE] = routed.latent_size
    if routed.routing.n_chosen_groups < routed.routing.n_groups:
        keys |= {
            "expert_group_count": routed.routing.n_groups,
            "expert_group_used_count": routed.routing.n_chosen_groups,
        }
    return keys


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    """The settings; a block is known by its key-value heads and its width."""
    model = from_gguf.model_settings(keys, "layer_norm_epsilon")
    attention, attends = from_gguf.attention_of_some_layers(keys)
    widths = keys.by_layer("feed_forward_length", model["num_hidden_layers"])
    pattern = ("*" if it_does else "E" if width else "M" for it_does, width in zip(attends, widths, strict=True))
    of_mamba = {"heads": "mamba_num_heads", "groups": "n_groups", "head_dim": "mamba_head_dim"}
    return {
        **{key: value for key, value in model.items() if key != "hidden_act"},
        **attention,
        **mamba2.from_keys(keys, **of_mamba, state="ssm_state_size", kernel="conv_kernel"),
        _PATTERN: "".join(pattern),
        "n_routed_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"),
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": keys.count("expert_shared_feed_forward_length"),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
        "norm_topk_prob": keys.flag("expert_weights_norm", default=False),
        _LATENT_SIZE: keys.count(_LATENT_SIZE) if _LATENT_SIZE in keys else None,
        "n_group": keys.count("expert_group_count", 1),
        "topk_group": keys.count("expert_group_used_count", 1),
    }


def _refusal(spec: ModelSpec) -> str | None:
    if any(isinstance(layer.feed_forward, Dense) for layer in spec.layers):
        return "graph has experts in all blocks without a mixer, and a block of this model has a dense feed-forward"
    return mamba2.limits(spec)


FAMILY = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("nemotron_h_moe", _keys, _refusal, mixes_layers=True, settings=_from_gguf),
    skipped=(SkippedPart(r"mtp\..*", MTP_PART),),
    why_no_mtp="the layer for MTP of this family is two of transformers' layers, which is not supported yet",
)
