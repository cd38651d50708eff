"""Parts that the families with gated delta layers share: Qwen3-Next, and Qwen3.5.

Most layers carry a state from token to token; the others attend, with a gate on the output and a part of each head
turned. All norms but the one inside of a gated delta rule multiply by 1 + w.
"""

from __future__ import annotations

import math
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.rope_settings import RopeRule
from compressors.model.description.family import ConfigValues, GgufValue, SkippedPart
from compressors.model.description.feed_forward import Routed, Shared
from compressors.model.description.mixers import GatedDelta, GroupedQuery, OutputGate, QkNorm
from compressors.model.description.mtp import MTP_PART
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import GgufTensor, Kind, NormKind, TensorSpec
from compressors.model.description.transforms import SAME, Chain, NegativeExponential, Squeezed, Transform
from compressors.model.errors import InputError
from compressors.model.families.shared import from_gguf, llama_cpp, parts, written_config
from compressors.model.families.shared.next_token import mtp_layer

__all__ = [
    "DEFAULTS",
    "DELTA",
    "GGUF",
    "MTP",
    "edited",
    "from_keys",
    "gguf_keys",
    "matrix",
    "model",
    "mtp",
    "refusal",
    "routed",
    "settings",
]

MTP = SkippedPart(r"(model\.)?mtp\..*", MTP_PART)

DEFAULTS = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
"""The defaults that both classes of transformers have."""

DELTA, GGUF = "model.layers.{layer}.linear_attn.", "blk.{layer}."
"""The beginnings of the names of a gated delta layer's tensors."""

_RECURRENT, _ATTENDING = "linear_attention", "full_attention"
_USUAL_INTERVAL = 4  # transformers' default: every fourth layer attends


def mtp(spec: ModelSpec) -> LayerSpec:
    """The layer that predicts one more token."""
    return mtp_layer(spec, f"mtp.layers.{_ONLY_ONE}.", _MTP_NAMES, NormKind.ONE_PLUS)


_ONLY_ONE = 0  # the number of the layer among its kind: llama.cpp takes no more than one
_MTP_NAMES = {
    Role.MTP_PROJECTION: "mtp.fc.weight",
    Role.MTP_EMBEDDING_NORM: "mtp.pre_fc_norm_embedding.weight",
    Role.MTP_STATE_NORM: "mtp.pre_fc_norm_hidden.weight",
    Role.MTP_OUTPUT_NORM: "mtp.norm.weight",
}


def matrix(
    role: Role, name: str, shape: tuple[str, ...], gguf: str, order: Transform = SAME, *, is_first: bool = False
) -> TensorSpec:
    """A matrix that is multiplied with a gated delta rule's input.

    Args:
        role: its role.
        name: its module inside the gated delta rule.
        shape: its shape in letters.
        gguf: its name in GGUF, inside the block.
        order: llama.cpp's order of its rows.
        is_first: the other matrices share this one's input.
    """
    place, input_of = GgufTensor(f"{GGUF}{gguf}.weight", order), None if is_first else Role.MIXER_INPUT
    return TensorSpec(role, f"{DELTA}{name}.weight", shape, place, shares_input_of=input_of)


def routed(settings: FamilySettings, *, normalizes: bool) -> Routed:
    """The experts, with a shared one behind a gate."""
    n_experts = settings.count("num_experts")  # these classes of transformers have no other spelling
    return parts.routed_in_mlp(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts),
        width=settings.count("moe_intermediate_size"),
        routing=Routing(normalizes=normalizes),
        shared=Shared(settings.count("shared_expert_intermediate_size"), is_gated=True),
    )


def model(
    settings: FamilySettings,
    experts: Routed,
    inputs: tuple[TensorSpec, ...],
    *,
    channels: Transform = SAME,
    heads: Transform = SAME,
    columns: Transform = SAME,
) -> ModelSpec:
    """A model of two kinds of layers.

    Args:
        settings: the family's settings.
        experts: the feed-forward of all layers.
        inputs: the matrices that are multiplied with a gated delta rule's input.
        channels: llama.cpp's order of the convolution's channels.
        heads: llama.cpp's order of vectors with a value for each value head.
        columns: llama.cpp's order of the inputs of the output matrix.
    """
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_bias", False)
    settings.require("attn_output_gate", True)
    settings.refuse_what_no_family_can_do(kinds=(_RECURRENT, _ATTENDING))
    common = (
        *parts.norms(NormKind.ONE_PLUS, "post_attention_norm"),
        parts.router_tensor(),
        *parts.expert_tensors(),
        *parts.shared_expert_tensors("mlp.shared_expert", gate="mlp.shared_expert_gate"),
    )
    attention = (*parts.attention_matrices(queries="P"), *parts.qk_norm_tensors(QkNorm.PER_HEAD, NormKind.ONE_PLUS))
    delta = (*inputs, *_rule_tensors(channels, heads, columns))
    by_kind = {
        _RECURRENT: parts.layer(settings, _delta(settings), experts, (*common, *delta)),
        _ATTENDING: parts.layer(settings, _attention(settings), experts, (*common, *attention)),
    }
    return parts.model(settings, [by_kind[kind] for kind in _kinds(settings)], final_norm=NormKind.ONE_PLUS)


def _rule_tensors(channels: Transform, heads: Transform, columns: Transform) -> tuple[TensorSpec, ...]:
    """The tensors of a gated delta rule that follow its input matrices."""
    convolution = GgufTensor(f"{GGUF}ssm_conv1d.weight", Chain((channels, Squeezed())))
    decay = GgufTensor(f"{GGUF}ssm_a", Chain((heads, NegativeExponential())))
    output = GgufTensor(f"{GGUF}ssm_out.weight", columns)
    return (
        TensorSpec(Role.CONVOLUTION, f"{DELTA}conv1d.weight", ("X", "1", "W"), convolution, Kind.CONVOLUTION),
        TensorSpec(Role.DECAY_LOGARITHM, f"{DELTA}A_log", ("N",), decay, Kind.VECTOR),
        TensorSpec(Role.DECAY_BIAS, f"{DELTA}dt_bias", ("N",), GgufTensor(f"{GGUF}ssm_dt.bias", heads), Kind.VECTOR),
        parts.norm(Role.MIXER_NORM, f"{DELTA}norm.weight", ("v",), f"{GGUF}ssm_norm.weight"),
        TensorSpec(Role.MIXER_OUTPUT, f"{DELTA}out_proj.weight", ("D", "Y"), output),
    )


def _kinds(settings: FamilySettings) -> list[str]:
    """The kind of each layer: from a list, else by the interval at which layers attend.

    Raises:
        InputError: no layer attends.
    """
    n_layers = settings.count("num_hidden_layers")
    kinds: list[str] | None = settings.settings.get("layer_types")
    if kinds is None:
        interval = settings.count("full_attention_interval", _USUAL_INTERVAL)
        kinds = [_RECURRENT if (index + 1) % interval else _ATTENDING for index in range(n_layers)]
    if _ATTENDING not in kinds:
        raise InputError(
            f"{settings.settings.path}: by layer_types or full_attention_interval none of the {n_layers} layers "
            "attends; transformers cannot run such a model either"
        )
    settings.settings.note("layer_types", kinds)
    return kinds


def _delta(settings: FamilySettings) -> GatedDelta:
    """Reads the recurrent mixer.

    Raises:
        InputError: transformers could not run a model with these numbers.
    """
    n_keys, n_values = settings.count("linear_num_key_heads"), settings.count("linear_num_value_heads")
    if n_values % n_keys:
        raise InputError(
            f"{settings.settings.path}: linear_num_value_heads is {n_values}, which linear_num_key_heads {n_keys} does "
            "not divide; transformers cannot run such a model either"
        )
    return GatedDelta(
        n_key_heads=n_keys,
        n_value_heads=n_values,
        key_dim=settings.count("linear_key_head_dim"),
        value_dim=settings.count("linear_value_head_dim"),
        kernel=settings.count("linear_conv_kernel_dim"),
    )


def _attention(settings: FamilySettings) -> GroupedQuery:
    n_heads, n_kv_heads, head_dim = settings.heads()
    return GroupedQuery(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rope=settings.rope(head_dim, RopeRule(default_share=0.25)),
        scale=1 / math.sqrt(head_dim),
        qk_norm=QkNorm.PER_HEAD,
        output_gate=OutputGate.QUERY,
    )


def settings(spec: ModelSpec) -> dict[str, Any]:
    """The settings of ``config.json`` that describe a model, by key, except those of a kind of layer that it lacks."""
    shared = parts.routed(spec).shared
    assert shared is not None
    found: dict[str, Any] = {
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.hidden_size,
        "layer_types": [_RECURRENT if layer.mixer.is_recurrent else _ATTENDING for layer in spec.layers],
        "num_experts": spec.n_experts,
        "num_experts_per_tok": spec.top_k,
        "moe_intermediate_size": spec.expert_width,
        "shared_expert_intermediate_size": shared.width,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": spec.rms_norm_eps,
    }
    for mixer in dict.fromkeys(layer.mixer for layer in spec.layers):
        found |= _mixer_settings(mixer)
    return found


def _mixer_settings(mixer: object) -> dict[str, Any]:
    if isinstance(mixer, GatedDelta):
        return {
            "linear_num_key_heads": mixer.n_key_heads,
            "linear_num_value_heads": mixer.n_value_heads,
            "linear_key_head_dim": mixer.key_dim,
            "linear_value_head_dim": mixer.value_dim,
            "linear_conv_kernel_dim": mixer.kernel,
        }
    assert isinstance(mixer, GroupedQuery)
    return {
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_kv_heads,
        "head_dim": mixer.head_dim,
    }


_GONE = ("num_local_experts", "full_attention_interval")
"""Settings that a student's list of kinds replaces."""

_N_MTP = "mtp_num_hidden_layers"


def edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    """A ``config.json`` with a student's counts and kinds of layers."""
    counts = ("num_experts", "moe_intermediate_size", "num_experts_per_tok", "layer_types")
    gone = _GONE if spec.mtp is not None else (*_GONE, _N_MTP)
    return written_config.moe_edited(spec, {key: value for key, value in config.items() if key not in gone}, *counts)


def gguf_keys(spec: ModelSpec) -> dict[str, GgufValue]:
    """The keys that both architectures of llama.cpp have.

    The kinds of layers are a list, which goes before the interval that llama.cpp's converter writes: a student without
    some layers has none.
    """
    delta = next(layer.mixer for layer in spec.layers if isinstance(layer.mixer, GatedDelta))
    (shared,) = {layer.routed.shared for layer in spec.layers if layer.routed is not None}
    assert shared is not None
    return llama_cpp.usual_keys(spec, "expert_feed_forward_length") | {
        "expert_shared_feed_forward_length": shared.width,
        "ssm.conv_kernel": delta.kernel,
        "ssm.state_size": delta.key_dim,
        "ssm.group_count": delta.n_key_heads,
        "ssm.time_step_rank": delta.n_value_heads,
        "ssm.inner_size": delta.width,
        "attention.recurrent_layers": tuple(layer.mixer.is_recurrent for layer in spec.blocks),
    }


def from_keys(keys: GgufKeys) -> dict[str, Any]:
    """The settings of a model, made of a file's keys: the inverse of :func:`gguf_keys`."""
    usual = from_gguf.usual_settings(keys, n_experts="num_experts", width="moe_intermediate_size")
    n_layers = usual["num_hidden_layers"]
    if "attention.recurrent_layers" in keys:
        are_recurrent = keys.by_layer("attention.recurrent_layers", n_layers)
    else:  # llama.cpp's converter writes an interval
        interval = max(1, keys.count("full_attention_interval", _USUAL_INTERVAL))
        are_recurrent = tuple((index + 1) % interval for index in range(n_layers))
    return usual | {
        "layer_types": [_RECURRENT if is_recurrent else _ATTENDING for is_recurrent in are_recurrent],
        "shared_expert_intermediate_size": keys.count("expert_shared_feed_forward_length"),
        "linear_num_key_heads": keys.count("ssm.group_count"),
        "linear_num_value_heads": keys.count("ssm.time_step_rank"),
        "linear_key_head_dim": keys.count("ssm.state_size"),
        "linear_value_head_dim": keys.count("ssm.state_size"),
        "linear_conv_kernel_dim": keys.count("ssm.conv_kernel"),
    }


def refusal(spec: ModelSpec) -> str | None:
    """Says which part of a model neither graph of llama.cpp can compute; None: none."""
    mixers = {layer.mixer for layer in spec.layers}
    if len({mixer.is_recurrent for mixer in mixers}) < 2:
        return "graph needs layers that attend and layers that do not, and all layers of this model are of one kind"
    for mixer in mixers:
        sentence = _limit_of_rule(mixer) if isinstance(mixer, GatedDelta) else None
        if sentence is not None:
            return sentence
    return llama_cpp.normalization_refusal(spec, always=True)


def _limit_of_rule(mixer: GatedDelta) -> str | None:
    if mixer.key_dim != mixer.value_dim:
        return (
            "graph has one size for keys and values of a gated delta rule; this model's are "
            f"{mixer.key_dim} and {mixer.value_dim}"
        )
    if mixer.kernel == 1:  # llama.cpp drops all axes of size 1
        return "graph needs a convolution over two tokens or more, and linear_conv_kernel_dim of this model is 1"
    return None
