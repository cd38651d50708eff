"""Gemma 4 with experts: a dense feed-forward beside them, and windows in most layers, whose heads are narrower.

On the hub it is the part for text of a larger model. Layers without a window have fewer and wider heads, turn a part of
each, and may take their values from the keys. The feed-forward that every token goes through is described as a shared
expert with norms of its own. A student is saved as a checkpoint of the language model alone, as nothing is read of the
parts that see and hear.

llama.cpp looks tanh-GELU up in a table of half precision, which moves logits by about a hundredth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compressors.model.config.family_settings import ATTENTION_KINDS, FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.rope_settings import RopeRule
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue, SkippedPart
from compressors.model.description.feed_forward import LostModule, Routed, Shared
from compressors.model.description.gguf_rope import PLAIN_FACTORS
from compressors.model.description.glu import Activation, Glu
from compressors.model.description.mixers import GroupedQuery, QkNorm
from compressors.model.description.roles import Role
from compressors.model.description.rope import RopeKind
from compressors.model.description.routing import Routing
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import GgufTensor, Kind, TensorSpec
from compressors.model.errors import UnsupportedError
from compressors.model.families.shared import from_gguf, parts, windowed, written_config
from compressors.model.names import shown

__all__ = ["FAMILY"]

_SLIDING, _FULL = "sliding_attention", "full_attention"
_DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
}
_DEFAULT_ROPE = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
_INTERVAL = 6
"""Where no list says otherwise, every so many layers one has no window."""

_SIZES = frozenset({"head_dim", "num_key_value_heads"})
"""Settings of single layers."""

_CAP = "final_logit_softcapping"
"""The limit of logits: a key of both kinds of files."""

_LAYER, _BLK = "model.layers.{layer}.", "blk.{layer}."
_GLU = Glu(Activation.GELU_TANH)
_BLOCK = (LostModule("mlp"), LostModule("router", n_outputs=3), LostModule("experts"))


def _norm(role: Role, name: str, gguf: str) -> TensorSpec:
    return parts.norm(role, f"{_LAYER}{name}", ("D",), f"{_BLK}{gguf}")


def _experts() -> tuple[TensorSpec, ...]:
    """The experts' matrices; in files those of all experts of a layer lie together."""
    gate, up, down = (f"experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up", "down"))
    found = []
    for tensor in parts.expert_tensors(gate, up, down, module="experts"):
        assert tensor.fused is not None
        found.append(replace(tensor, fused=replace(tensor.fused, is_only_form=True)))
    return tuple(found)


def _beside_experts() -> tuple[TensorSpec, ...]:
    """The feed-forward that every token goes through."""
    names = {Role.SHARED_GATE: "gate", Role.SHARED_UP: "up", Role.SHARED_DOWN: "down"}
    return tuple(
        replace(tensor, gguf=GgufTensor(f"{_BLK}ffn_{names[tensor.role]}.weight"))
        for tensor in parts.shared_expert_tensors("mlp")
    )


_SCALE = TensorSpec(
    Role.EXPERT_SCALE,
    f"{_LAYER}router.per_expert_scale",
    ("E",),
    GgufTensor(f"{_BLK}ffn_down_exps.scale"),
    Kind.ROUTER,
    experts_axis=0,
)
_OF_LAYER = TensorSpec(
    Role.LAYER_SCALE, f"{_LAYER}layer_scalar", ("1",), GgufTensor(f"{_BLK}layer_output_scale.weight"), Kind.VECTOR
)
_TENSORS = (
    _norm(Role.ATTENTION_NORM, "input_layernorm.weight", "attn_norm.weight"),
    *parts.attention_matrices(),
    *parts.qk_norm_tensors(QkNorm.PER_HEAD),
    _norm(Role.ATTENTION_OUTPUT_NORM, "post_attention_layernorm.weight", "post_attention_norm.weight"),
    _norm(Role.MOE_NORM, "pre_feedforward_layernorm_2.weight", "pre_ffw_norm_2.weight"),
    _norm(Role.MOE_OUTPUT_NORM, "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
    _norm(Role.ROUTER_NORM, "router.scale", "ffn_gate_inp.scale"),
    parts.router_tensor("router.proj.weight", module="router.proj.weight"),
    _SCALE,
    *_experts(),
    _norm(Role.EXPERTS_OUTPUT_NORM, "post_feedforward_layernorm_2.weight", "post_ffw_norm_2.weight"),
    _norm(Role.SHARED_NORM, "pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    *_beside_experts(),
    _norm(Role.SHARED_OUTPUT_NORM, "post_feedforward_layernorm_1.weight", "post_ffw_norm_1.weight"),
    _OF_LAYER,
)

(_VALUES,) = (tensor for tensor in _TENSORS if tensor.role is Role.VALUE)


def _tensors(mixer: GroupedQuery) -> tuple[TensorSpec, ...]:
    """The tensors of a layer; one whose values are its keys has no matrix for them."""
    return tuple(tensor for tensor in _TENSORS if not (mixer.values_are_keys and tensor.role is Role.VALUE))


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    _refuse_other_models(settings)
    usual = _usual_kinds(settings.count("num_hidden_layers"))
    windows, sliding, full = settings.layer_windows(usual), _sliding_attention(settings), _full_attention(settings)
    mixers = [full if window is None else replace(sliding, window=window) for window in windows]
    experts = _routed(settings)
    kinds = {mixer: parts.layer(settings, mixer, experts, _tensors(mixer)) for mixer in dict.fromkeys(mixers)}
    return parts.model(
        settings,
        [kinds[mixer] for mixer in mixers],
        tied_by_default=True,
        embedding_scale=math.sqrt(settings.count("hidden_size")),
        logit_cap=settings.number_or_null("final_logit_softcapping"),
    )


def _refuse_other_models(settings: FamilySettings) -> None:
    """Refuses models of this type without experts, and parts that only other sizes have.

    Raises:
        UnsupportedError: there is one; the message names the setting.
    """
    named = settings.settings.named
    if not settings.flag("enable_moe_block", default=False):
        raise UnsupportedError(
            f"{named('enable_moe_block')} is not true: it is a dense model; this tool compresses MoE models"
        )
    if settings.whole_number("hidden_size_per_layer_input"):
        raise UnsupportedError(
            f"{named('hidden_size_per_layer_input')} is not 0: embeddings of each layer are not supported, which no "
            "Gemma 4 with experts has"
        )
    settings.ignore("vocab_size_per_layer_input", "use_double_wide_mlp")  # of parts that are refused
    settings.require("num_kv_shared_layers", 0)
    settings.require("attention_bias", False)
    settings.require("hidden_activation", _GLU.activation.value)
    settings.require("use_bidirectional_attention", None, "vision")  # no picture is read
    settings.refuse_what_no_family_can_do(understood=("per_layer_config",))
    kinds = settings.kinds("layer_types", ATTENTION_KINDS)
    if kinds is not None and kinds[-1] != _FULL:
        raise UnsupportedError(
            f"{named('layer_types')} gives the last layer a window, which transformers' class takes away again"
        )


def _usual_kinds(n_layers: int) -> list[str]:
    kinds = [_SLIDING if (index + 1) % _INTERVAL else _FULL for index in range(n_layers)]
    return [*kinds[:-1], _FULL]


def _sliding_attention(settings: FamilySettings) -> GroupedQuery:
    """The attention of layers with a window, without it."""
    return _attention(settings, _SLIDING, *settings.heads())


def _full_attention(settings: FamilySettings) -> GroupedQuery:
    """The attention of layers without a window; transformers writes its sizes out for each of them."""
    values_are_keys = settings.flag("attention_k_eq_v", default=False)
    by_layer = settings.settings.get("per_layer_config")
    n_kv_heads = head_dim = None
    if by_layer is not None:
        settings.ignore("per_layer_config", "global_head_dim", "num_global_key_value_heads")
        n_kv_heads, head_dim = _of_each_full_layer(settings, by_layer)
    else:
        head_dim = settings.count("global_head_dim")
        n_kv_heads = settings.count_or_null("num_global_key_value_heads") if values_are_keys else None
        settings.ignore("num_global_key_value_heads")
    attention = _attention(settings, _FULL, *settings.heads(n_kv_heads, head_dim))
    return replace(attention, values_are_keys=values_are_keys)


def _of_each_full_layer(settings: FamilySettings, by_layer: object) -> tuple[int | None, int | None]:
    """Key-value heads and values of a head by ``per_layer_config``; None: as in the other layers.

    Raises:
        UnsupportedError: it has other settings, or is not the same for all layers without a window.
    """
    kinds = settings.settings.get("layer_types") or _usual_kinds(settings.count("num_hidden_layers"))
    full = {index for index, kind in enumerate(kinds) if kind == _FULL}
    found = by_layer if isinstance(by_layer, dict) else {}
    if not found:
        return None, None
    indices = {int(index) for index in found if str(index).isdecimal()}  # transformers pads them with zeros
    first, *others = found.values()
    are_sizes = isinstance(first, dict) and first.keys() <= _SIZES and all(map(_is_count, first.values()))
    if indices != full or len(found) > len(full) or any(other != first for other in others) or not are_sizes:
        raise UnsupportedError(
            f"{settings.settings.named('per_layer_config')} must have {' and '.join(sorted(_SIZES))} for all layers of "
            f"{_FULL} alike, and nothing else, not {shown(by_layer)}"
        )
    return first.get("num_key_value_heads"), first.get("head_dim")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _attention(settings: FamilySettings, kind: str, n_heads: int, n_kv_heads: int, head_dim: int) -> GroupedQuery:
    return GroupedQuery(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rope=settings.rope(head_dim, RopeRule(layer_kind=kind, default=_DEFAULT_ROPE)),
        scale=1.0,
        qk_norm=QkNorm.PER_HEAD,
        norms_values=True,
    )


def _routed(settings: FamilySettings) -> Routed:
    n_experts = settings.count("num_experts")
    return Routed(
        n_experts=n_experts,
        top_k=settings.top_k(n_experts, "top_k_experts"),
        width=settings.count("moe_intermediate_size"),
        routing=Routing(has_expert_scale=True),
        glu=_GLU,
        shared=Shared(settings.count("intermediate_size"), has_norms=True),
        experts_module="experts",
        block=_BLOCK,
    )


def _settings(spec: ModelSpec) -> ConfigValues:
    kinds, experts = written_config.attention_kinds(spec), parts.routed(spec)
    assert experts.shared is not None
    sliding = _of_kind(spec, _SLIDING) or _of_kind(spec, _FULL)
    full = _of_kind(spec, _FULL) or sliding
    assert sliding is not None and full is not None
    sizes = {"head_dim": full.head_dim, "num_key_value_heads": full.n_kv_heads}
    return {
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": experts.shared.width,
        "num_attention_heads": sliding.n_heads,
        "num_key_value_heads": sliding.n_kv_heads,
        "head_dim": sliding.head_dim,
        "layer_types": kinds,
        "per_layer_config": {str(index): dict(sizes) for index, kind in enumerate(kinds) if kind == _FULL},
        "attention_k_eq_v": full.values_are_keys,
        "num_experts": spec.n_experts,
        "top_k_experts": spec.top_k,
        "moe_intermediate_size": spec.expert_width,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": spec.rms_norm_eps,
        "final_logit_softcapping": spec.logit_cap,
    }


def _of_kind(spec: ModelSpec, kind: str) -> GroupedQuery | None:
    """The attention of the first layer of a kind; None: no layer is of it."""
    kinds = written_config.attention_kinds(spec)
    return parts.grouped_query(spec, kinds.index(kind)) if kind in kinds else None


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    counts = ("num_experts", "moe_intermediate_size", "top_k_experts", "layer_types", "per_layer_config")
    return written_config.moe_edited(spec, config, *counts)


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    """The keys of ``llama_model_gemma4::load_arch_hparams`` in llama.cpp's ``src/models/gemma4.cpp``."""
    sliding, full, experts = _of_kind(spec, _SLIDING), _of_kind(spec, _FULL), parts.routed(spec)
    assert sliding is not None and full is not None and experts.shared is not None
    assert sliding.rope is not None and full.rope is not None
    keys: dict[str, GgufValue] = {
        "block_count": spec.n_layers,
        "context_length": spec.context_length,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": experts.shared.width,
        "attention.head_count": full.n_heads,
        "attention.head_count_kv": tuple(parts.grouped_query(spec, index).n_kv_heads for index in range(spec.n_layers)),
        "attention.layer_norm_rms_epsilon": spec.rms_norm_eps,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "expert_count": experts.n_experts,
        "expert_used_count": experts.top_k,
        "expert_feed_forward_length": experts.width,
        "vocab_size": spec.vocab_size,
        **windowed.gguf_keys(spec),
    }
    for end, mixer, rope in (("", full, full.rope), ("_swa", sliding, sliding.rope)):
        keys |= {
            f"attention.key_length{end}": mixer.head_dim,
            f"attention.value_length{end}": mixer.head_dim,
            f"rope.freq_base{end}": rope.theta,
            f"rope.dimension_count{end}": rope.width,
        }
    return keys if spec.logit_cap is None else keys | {_CAP: spec.logit_cap}


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    """The settings; a file without a matrix for the values of its last layer takes them from the keys."""
    model, n_layers = from_gguf.model_settings(keys), from_gguf.n_layers(keys)
    has_windows = keys.by_layer("attention.sliding_window_pattern", n_layers)
    n_kv_heads = keys.by_layer("attention.head_count_kv", n_layers)
    by_kind = {bool(has_window): number for has_window, number in zip(has_windows, n_kv_heads, strict=True)}
    full_head, sliding_head = keys.count("attention.key_length"), keys.count("attention.key_length_swa")
    factors = keys.read(PLAIN_FACTORS) if keys.has_tensor(PLAIN_FACTORS) else None
    share = 1.0 if factors is None else int((factors == 1).sum()) / len(factors)
    ropes = {
        _SLIDING: {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa")},
        _FULL: {
            "rope_type": "proportional",
            "rope_theta": keys.number("rope.freq_base"),
            "partial_rotary_factor": share,
        },
    }
    return {
        **{key: value for key, value in model.items() if key != "hidden_act"},
        **from_gguf.window_settings(keys),
        "hidden_activation": _GLU.activation.value,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": keys.count("embedding_length_per_layer_input"),
        "num_kv_shared_layers": keys.count("attention.shared_kv_layers"),
        "num_attention_heads": keys.count("attention.head_count"),
        "num_key_value_heads": by_kind.get(True, 1),
        "head_dim": sliding_head,
        "global_head_dim": full_head,
        "num_global_key_value_heads": by_kind.get(False),
        "attention_k_eq_v": not keys.has_tensor(_VALUES.gguf.name.format(layer=n_layers - 1)),
        "intermediate_size": keys.count("feed_forward_length"),
        "num_experts": keys.count("expert_count"),
        "top_k_experts": keys.count("expert_used_count"),
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "final_logit_softcapping": keys.number(_CAP) if _CAP in keys else None,
        "rope_parameters": ropes,
    }


def _refusal(spec: ModelSpec) -> str | None:
    sliding, full = _of_kind(spec, _SLIDING), _of_kind(spec, _FULL)
    if sliding is None or full is None:
        return "graph needs layers with a window and layers without one, and this model has only one kind of them"
    assert full.rope is not None
    if full.rope.kind is RopeKind.PROPORTIONAL:
        return None
    return (
        "graph reads factors of the rotary angles, as rope_type proportional makes them, for layers without a window; "
        f"those of this model are of the type {full.rope.kind}"
    )


def _limit_of_class(spec: ModelSpec) -> str | None:
    if spec.layers[-1].mixer.window is None:
        return None
    return "takes away the window of the last layer, and this model's last layer has one"


FAMILY = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("gemma4", _keys, _refusal, takes_rope_factors=True, settings=_from_gguf),
    skipped=(
        SkippedPart(
            r"model\.(vision_tower|audio_tower|embed_vision|embed_audio)\..*",
            "the parts that see and hear",
            in_projector=True,
        ),
    ),
    whole_model_type="gemma4",
    prefixes=("model.language_model.",),
    refusal=_limit_of_class,
)
