"""gpt-oss: attention with sinks and biases, a window in every second layer, and experts with a clamped SwiGLU.

OpenAI's checkpoints hold the experts in MXFP4; transformers saves them in bfloat16, transposed. They have YaRN with
``truncate`` false, which llama.cpp computes as if it were true, whatever a file says: a few pairs turn by slightly
other angles. ONNX files hold the right ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.rope_settings import RopeRule
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue
from compressors.model.description.feed_forward import LostModule
from compressors.model.description.glu import Glu
from compressors.model.description.roles import Role
from compressors.model.description.routing import Routing, Score
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import Fused, GgufTensor, Kind, TensorSpec
from compressors.model.description.transforms import EverySecond
from compressors.model.families.shared import from_gguf, llama_cpp, parts, written_config

__all__ = ["FAMILY"]

_DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "intermediate_size": 2880,
    "num_experts_per_tok": 4,
    "num_local_experts": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_GLU = Glu(alpha=1.702, limit=7.0, offset=1.0)  # constants of llama.cpp's graph

_LAYER, _BLK = "model.layers.{layer}.", "blk.{layer}."
_EXPERTS = f"{_LAYER}mlp.experts."
_ROUTER = parts.router_tensor("mlp.router.weight", module="mlp.router.weight")


def _experts() -> tuple[TensorSpec, ...]:
    """The experts' matrices; in files those of all experts of a layer lie together."""
    down = Fused(f"{_EXPERTS}down_proj", is_transposed=True, may_be_mxfp4=True)
    return parts.fused_expert_tensors(replace(down, name=f"{_EXPERTS}gate_up_proj", is_interleaved=True), down)


def _vectors() -> tuple[TensorSpec, ...]:
    """The biases of attention's output and of the experts, and the sinks."""
    attention = f"{_LAYER}self_attn."
    output = GgufTensor(f"{_BLK}attn_output.bias")
    gate_gguf = GgufTensor(f"{_BLK}ffn_gate_exps.bias", EverySecond(0))
    gate_up = TensorSpec(
        Role.EXPERT_GATE_UP_BIAS,
        f"{_EXPERTS}gate_up_proj_bias",
        ("E", "2F"),
        gate_gguf,
        Kind.VECTOR,
        experts_axis=0,
        gguf_rest=(GgufTensor(f"{_BLK}ffn_up_exps.bias", EverySecond(1)),),
        alternates=True,
    )
    down_gguf = GgufTensor(f"{_BLK}ffn_down_exps.bias")
    down_name = f"{_EXPERTS}down_proj_bias"
    return (
        TensorSpec(Role.ATTENTION_OUTPUT_BIAS, f"{attention}o_proj.bias", ("D",), output, Kind.VECTOR),
        TensorSpec(Role.SINKS, f"{attention}sinks", ("H",), GgufTensor(f"{_BLK}attn_sinks.weight"), Kind.VECTOR),
        gate_up,
        TensorSpec(Role.EXPERT_DOWN_BIAS, down_name, ("E", "D"), down_gguf, Kind.VECTOR, experts_axis=0),
    )


def _tensors() -> tuple[TensorSpec, ...]:
    """All tensors of a layer."""
    of_attention = (
        replace(tensor, gguf=GgufTensor(f"{_BLK}post_attention_norm.weight"))
        if tensor.role is Role.MOE_NORM
        else tensor
        for tensor in parts.attention_tensors()
    )
    bias_gguf = GgufTensor(f"{_BLK}ffn_gate_inp.bias")
    bias = TensorSpec(Role.ROUTER_BIAS, f"{_LAYER}mlp.router.bias", ("E",), bias_gguf, Kind.ROUTER, experts_axis=0)
    return (*of_attention, *parts.bias_tensors(), _ROUTER, bias, *_experts(), *_vectors())


_TENSORS = _tensors()


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_bias", True)
    settings.refuse_what_no_family_can_do()
    n_experts = settings.count_of("num_experts", "num_local_experts")
    experts = parts.routed_in_mlp(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts),
        width=settings.count("intermediate_size"),
        routing=Routing(Score.LOGITS),
        glu=replace(_GLU, alpha=settings.number("swiglu_alpha"), limit=settings.number("swiglu_limit")),
        block=(LostModule("mlp", n_outputs=2),),
    )
    attention = parts.attention(settings, rope=RopeRule(150_000.0, default=_DEFAULT_ROPE), has_kinds=True)
    n_layers = settings.count("num_hidden_layers")
    kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(n_layers)]
    mixers = [replace(attention, window=window) for window in settings.layer_windows(kinds)]
    return parts.model(settings, [parts.layer(settings, mixer, experts, _TENSORS) for mixer in mixers])


def _settings(spec: ModelSpec) -> ConfigValues:
    usual = written_config.usual_settings(
        spec, n_experts="num_local_experts", width="intermediate_size", normalizes=None
    )
    (glu,) = {layer.routed.glu for layer in spec.layers if layer.routed is not None}
    kinds = written_config.attention_kinds(spec)
    return {**usual, "layer_types": kinds, "swiglu_alpha": glu.alpha, "swiglu_limit": glu.limit}


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    counts = ("num_local_experts", "intermediate_size", "num_experts_per_tok", "layer_types")
    return written_config.moe_edited(spec, config, *counts, other_spelling="num_experts")


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    """The usual keys; llama.cpp gives every second layer, from the first on, a window unless a list says otherwise."""
    windows = [layer.mixer.window for layer in spec.layers]
    have_one = tuple(window is not None for window in windows)
    keys: dict[str, GgufValue] = {
        **llama_cpp.usual_keys(spec),
        "expert_feed_forward_length": spec.expert_width,
        "attention.sliding_window": max(window or 0 for window in windows),
    }
    if have_one != tuple(index % 2 == 0 for index in range(len(windows))):
        keys["attention.sliding_window_pattern"] = have_one
    return keys


def _refusal(spec: ModelSpec) -> str | None:
    if all(layer.mixer.window is None for layer in spec.layers):
        return "graph needs a layer with a window, and no layer of this model has one"
    functions = {layer.routed.glu for layer in spec.layers if layer.routed is not None}
    if functions <= {_GLU}:
        return llama_cpp.limit_of_untied_head(spec)
    return f"graph has swiglu_alpha {_GLU.alpha} and swiglu_limit {_GLU.limit} built in; this model's are " + ", ".join(
        f"{glu.alpha} and {glu.limit}" for glu in functions
    )


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    """The settings; whether YaRN truncates, no file says: it is transformers' default."""
    usual = from_gguf.usual_settings(keys, n_experts="num_local_experts", width="intermediate_size")
    n_layers = usual["num_hidden_layers"]
    scaling = usual.get("rope_scaling", {"rope_type": "default"})
    if scaling["rope_type"] == "yarn":
        scaling = {**_DEFAULT_ROPE, **scaling}
    windows = from_gguf.window_settings(keys, tuple(index % 2 == 0 for index in range(n_layers)))
    return {**usual, **windows, "rope_scaling": scaling, "attention_bias": True}


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("gpt-oss", _keys, _refusal, settings=_from_gguf),
)
