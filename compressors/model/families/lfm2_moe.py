"""LFM2-MoE: short convolutions between layers that attend, leading dense layers, and sigmoid scores with a bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.gguf_rope_settings import rope_settings
from compressors.model.config.rope_settings import RopeRule
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue
from compressors.model.description.feed_forward import Dense, LostModule, Routed
from compressors.model.description.mixers import GroupedQuery, Mixer, QkNorm, ShortConvolution
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing, Score
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import GgufTensor, Kind, TensorSpec
from compressors.model.description.transforms import Squeezed
from compressors.model.errors import InputError
from compressors.model.families.shared import expert_layers, from_gguf, llama_cpp, parts, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 65536,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
    "num_dense_layers": 2,
    "num_experts_per_tok": 4,
    "num_experts": 32,
    "routed_scaling_factor": 1.0,
}
_CONVOLVING, _ATTENDING = "conv", "full_attention"
_LAYER, _GGUF = "model.layers.{layer}.", "blk.{layer}."
_BLOCK = "feed_forward"
_EXPERT = f"{_BLOCK}.experts.{{expert}}."

_NORMS = (
    parts.norm(Role.ATTENTION_NORM, f"{_LAYER}operator_norm.weight", ("D",), f"{_GGUF}attn_norm.weight"),
    parts.norm(Role.MOE_NORM, f"{_LAYER}ffn_norm.weight", ("D",), f"{_GGUF}ffn_norm.weight"),
)


def _attention_tensors() -> tuple[TensorSpec, ...]:
    *inputs, output = parts.attention_matrices()
    attention = f"{_LAYER}self_attn."
    return (
        *inputs,
        replace(output, name=f"{attention}out_proj.weight"),
        parts.norm(Role.QUERY_NORM, f"{attention}q_layernorm.weight", ("h",), f"{_GGUF}attn_q_norm.weight"),
        parts.norm(Role.KEY_NORM, f"{attention}k_layernorm.weight", ("h",), f"{_GGUF}attn_k_norm.weight"),
    )


def _convolution_tensors() -> tuple[TensorSpec, ...]:
    """The tensors of a short convolution; rows of its input matrix are gates, second gates and values."""
    module, gguf = f"{_LAYER}conv.", f"{_GGUF}shortconv."
    convolution = GgufTensor(f"{gguf}conv.weight", Squeezed())
    return (
        TensorSpec(Role.MIXER_INPUT, f"{module}in_proj.weight", ("3X", "D"), GgufTensor(f"{gguf}in_proj.weight")),
        TensorSpec(Role.CONVOLUTION, f"{module}conv.weight", ("X", "1", "W"), convolution, Kind.CONVOLUTION),
        TensorSpec(Role.MIXER_OUTPUT, f"{module}out_proj.weight", ("D", "X"), GgufTensor(f"{gguf}out_proj.weight")),
    )


def _dense_tensors() -> tuple[TensorSpec, ...]:
    names = {Role.DENSE_GATE: "w1", Role.DENSE_UP: "w3", Role.DENSE_DOWN: "w2"}
    return tuple(
        replace(tensor, name=f"{_LAYER}{_BLOCK}.{names[tensor.role]}.weight")
        for tensor in parts.leading_dense_tensors()
    )


_EXPERTS = (
    parts.router_tensor(f"{_BLOCK}.gate.weight", f"{_BLOCK}.gate.weight"),
    *parts.expert_tensors(
        gate=f"{_EXPERT}w1.weight", up=f"{_EXPERT}w3.weight", down=f"{_EXPERT}w2.weight", module=f"{_BLOCK}.experts"
    ),
)


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    settings.require("conv_bias", False)
    settings.require("sliding_window", None)
    settings.refuse_what_no_family_can_do(kinds=(_CONVOLVING, _ATTENDING))
    kinds, are_dense = _kinds(settings), expert_layers.leading_dense(settings, "num_dense_layers")
    parts.refuse_without_experts(settings, are_dense, "num_dense_layers")
    of_layers = list(zip(kinds, are_dense, strict=True))
    layers = {each: _layer(settings, *each) for each in dict.fromkeys(of_layers)}
    spec = parts.model(settings, [layers[each] for each in of_layers], epsilon="norm_eps", tied_by_default=True)
    return _with_norm_and_head(settings, spec)


def _kinds(settings: FamilySettings) -> list[str]:
    """The kind of each layer.

    Raises:
        InputError: there is no list, or no layer attends.
    """
    kinds = settings.settings.get("layer_types")
    settings.settings.note("layer_types", kinds)
    if kinds is None or _ATTENDING not in kinds:
        raise InputError(f"{settings.settings.named('layer_types')} must name layers of {_ATTENDING}, one or more")
    found: list[str] = kinds
    return found


def _layer(settings: FamilySettings, kind: str, is_dense: bool) -> LayerSpec:
    attends = kind == _ATTENDING
    mixer: Mixer = _attention(settings) if attends else _convolution(settings)
    common = (*_NORMS, *(_attention_tensors() if attends else _convolution_tensors()))
    if is_dense:
        width = settings.count("intermediate_size")
        return parts.layer(settings, mixer, Dense(width), (*common, *_dense_tensors()))
    experts = _experts(settings)
    bias = (parts.selection_bias_tensor(f"{_BLOCK}.expert_bias"),) if experts.routing.has_selection_bias else ()
    return parts.layer(settings, mixer, experts, (*common, *_EXPERTS, *bias))


def _attention(settings: FamilySettings) -> GroupedQuery:
    return parts.attention(settings, QkNorm.PER_HEAD, rope=RopeRule(1_000_000.0))


def _convolution(settings: FamilySettings) -> ShortConvolution:
    return ShortConvolution(settings.count("hidden_size"), settings.count("conv_L_cache"))


def _experts(settings: FamilySettings) -> Routed:
    n_experts = settings.count("num_experts")  # this class of transformers has no other spelling
    return Routed(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts),
        width=settings.count("moe_intermediate_size"),
        routing=Routing(
            Score.SIGMOID,
            has_selection_bias=settings.flag("use_expert_bias", default=True),
            normalizes=settings.flag("norm_topk_prob", default=True),
            epsilon=1e-6,
            scale=settings.number("routed_scaling_factor"),
        ),
        experts_module=f"{_BLOCK}.experts",
        block=(LostModule(_BLOCK),),
    )


def _with_norm_and_head(settings: FamilySettings, spec: ModelSpec) -> ModelSpec:
    """The model with the final norm under its name, and the older setting for a tied head, which goes first."""
    norm = parts.norm(Role.FINAL_NORM, "model.embedding_norm.weight", ("D",), "token_embd_norm.weight")
    is_tied = settings.flag("tie_embedding", default=spec.tied_embeddings)
    settings.settings.note("tie_word_embeddings", is_tied)
    tensors = tuple(norm if tensor.role is Role.FINAL_NORM else tensor for tensor in spec.tensors)
    return replace(spec, tensors=tensors, tied_embeddings=is_tied)


def _kernel(spec: ModelSpec) -> int | None:
    """The tokens that its convolutions cover; None if it has none."""
    return next((layer.mixer.kernel for layer in spec.layers if isinstance(layer.mixer, ShortConvolution)), None)


def _settings(spec: ModelSpec) -> ConfigValues:
    """The settings, except those of a kind of layer that the model lacks."""
    routed = parts.routed(spec)
    found: dict[str, Any] = {
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.hidden_size,
        "layer_types": [_CONVOLVING if layer.mixer.is_recurrent else _ATTENDING for layer in spec.layers],
        "num_dense_layers": parts.n_dense(spec),
        "num_experts": routed.n_experts,
        "num_experts_per_tok": routed.top_k,
        "moe_intermediate_size": routed.width,
        "use_expert_bias": routed.routing.has_selection_bias,
        "norm_topk_prob": routed.routing.normalizes,
        "routed_scaling_factor": routed.routing.scale,
        "vocab_size": spec.vocab_size,
        "norm_eps": spec.rms_norm_eps,
    }
    for mixer in dict.fromkeys(layer.mixer for layer in spec.layers):
        found |= _mixer_settings(mixer)
    return found | written_config.dense_width(spec)


def _mixer_settings(mixer: Mixer) -> dict[str, Any]:
    if isinstance(mixer, ShortConvolution):
        return {"conv_L_cache": mixer.kernel}
    assert isinstance(mixer, GroupedQuery)
    return {"num_attention_heads": mixer.n_heads, "num_key_value_heads": mixer.n_kv_heads}


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    counts = ("num_experts", "moe_intermediate_size", "num_experts_per_tok", "num_dense_layers", "layer_types")
    others = {key: value for key, value in config.items() if key != "tie_embedding"}
    return written_config.moe_edited(spec, others, *counts, other_spelling="num_local_experts")


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    """The keys; a layer without key-value heads is one with a convolution."""
    kernel, n_kv_heads = _kernel(spec), parts.grouped_query(spec).n_kv_heads
    assert kernel is not None
    return llama_cpp.usual_keys(spec) | {
        "attention.head_count_kv": tuple(0 if layer.mixer.is_recurrent else n_kv_heads for layer in spec.layers),
        "shortconv.l_cache": kernel,
        "leading_dense_block_count": parts.n_dense(spec),
        "expert_feed_forward_length": parts.routed(spec).width,
        "expert_gating_func": llama_cpp.GATING_FUNCTIONS[Score.SIGMOID],
    }


def _refusal(spec: ModelSpec) -> str | None:
    kernel, rule = _kernel(spec), parts.routed(spec).routing
    if kernel is None:
        return "graph needs a layer with a convolution, and this model has none"
    if kernel == 1:
        return "graph needs a convolution over two tokens or more, and conv_L_cache of this model is 1"
    if not rule.has_selection_bias:
        return "graph needs a bias for the choice of experts, and this model has none"
    if rule.scale != 1.0:
        return f"graph does not multiply weights by routed_scaling_factor, which is {rule.scale:g} in this model"
    return llama_cpp.normalization_refusal(spec, always=True) or llama_cpp.limit_of_square_queries(spec)


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    """The settings; a layer without key-value heads is one with a convolution."""
    model = from_gguf.model_settings(keys, "norm_eps")
    attention, attends = from_gguf.attention_of_some_layers(keys)
    return {
        **model,
        **attention,
        **rope_settings(keys, attention["head_dim"]),
        **from_gguf.dense_width(keys),
        "layer_types": [_ATTENDING if it_does else _CONVOLVING for it_does in attends],
        "conv_L_cache": keys.count("shortconv.l_cache"),
        "num_dense_layers": keys.count("leading_dense_block_count", 0),
        "num_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"),
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
    }


FAMILY = Family(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("lfm2moe", _keys, _refusal, settings=_from_gguf),
)
