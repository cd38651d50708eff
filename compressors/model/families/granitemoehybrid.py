"""Granite 4.0 H: Mamba-2 in most layers and attention in few, fused experts, and a shared one in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.gguf_rope_settings import is_turned, rope_settings
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily, GgufValue
from compressors.model.description.feed_forward import Shared
from compressors.model.description.mixers import GroupedQuery, Mamba2
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.errors import InputError
from compressors.model.families.shared import from_gguf, granite, llama_cpp, mamba2, written_config
from compressors.model.names import shown

__all__ = ["FAMILY"]

_DEFAULTS = {
    **granite.DEFAULTS,
    "shared_intermediate_size": 1024,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
_RECURRENT, _ATTENDING = "mamba", "attention"
_SPELLINGS = {"linear_attention": _RECURRENT, "full_attention": _ATTENDING}
"""The kinds of layers as transformers 5 writes them, and as the hub has them."""


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS, nullable=("num_key_value_heads",))
    settings.require("hidden_act", "silu", "swish")
    for key in ("attention_bias", "mamba_proj_bias"):
        settings.require(key, False)
    settings.require("sliding_window", None)
    settings.refuse_what_no_family_can_do(kinds=(_RECURRENT, _ATTENDING, *_SPELLINGS))
    mamba2.refuse_limits_of_steps(settings)
    settings.ignore("mamba_chunk_size")  # of transformers' arithmetic
    kinds = _kinds(settings)
    return granite.model(settings, [_layers(settings)[kind] for kind in kinds])


def _kinds(settings: FamilySettings) -> list[str]:
    """The kind of each layer.

    Raises:
        InputError: there is no list, or no layer attends.
    """
    kinds = settings.settings.get("layer_types")
    found = [_SPELLINGS.get(kind, kind) for kind in kinds or ()]
    if _ATTENDING not in found:
        raise InputError(f"{settings.settings.named('layer_types')} must name layers of {_ATTENDING}, one or more")
    settings.ignore("layer_types")  # of two spellings transformers keeps its own
    return found


def _layers(settings: FamilySettings) -> Mapping[str, LayerSpec]:
    """The layer of each kind."""
    experts = granite.experts(settings, Shared(settings.count("shared_intermediate_size")))
    of_mamba = mamba2.tensors("model.layers.{layer}.mamba.", has_bias=settings.flag("mamba_conv_bias", default=True))
    return {
        _RECURRENT: granite.layer(settings, _mamba(settings), of_mamba, experts),
        _ATTENDING: granite.layer(settings, _attention(settings), granite.ATTENTION, experts),
    }


def _attention(settings: FamilySettings) -> GroupedQuery:
    """Attention, which turns queries and keys only if the settings say so."""
    attention, kind = granite.attention(settings), settings.settings.get("position_embedding_type")
    settings.settings.note("position_embedding_type", kind)
    return attention if kind == "rope" else replace(attention, rope=None)


def _mamba(settings: FamilySettings) -> Mamba2:
    """Mamba-2, whose heads together are a number of times as wide as the hidden size.

    Raises:
        InputError: a number of heads, or their width, does not fit.
    """
    width, n_heads = settings.count("mamba_expand") * settings.count("hidden_size"), settings.count("mamba_n_heads")
    head_dim, said = width // n_heads, settings.settings.get("mamba_d_head", "auto")
    if width % n_heads or said not in ("auto", head_dim):
        raise InputError(
            f"{settings.settings.path}: mamba_n_heads {n_heads} times mamba_d_head {shown(said)} must be mamba_expand "
            f"times hidden_size, {width}"
        )
    return mamba2.mixer(
        settings,
        heads="mamba_n_heads",
        groups="mamba_n_groups",
        head_dim=head_dim,
        head_dim_key="mamba_d_head",
        state="mamba_d_state",
        kernel="mamba_d_conv",
    )


def _width(spec: ModelSpec) -> int:
    shared = granite.shared_expert(spec)
    assert shared is not None
    return shared.width


def _settings(spec: ModelSpec) -> ConfigValues:
    found = {**granite.settings(spec), "shared_intermediate_size": _width(spec), "layer_types": _written_kinds(spec)}
    mixer = next((layer.mixer for layer in spec.layers if isinstance(layer.mixer, Mamba2)), None)
    if mixer is None:
        return found
    return found | {
        "mamba_n_heads": mixer.n_heads,
        "mamba_n_groups": mixer.n_groups,
        "mamba_d_head": mixer.head_dim,
        "mamba_d_state": mixer.key_dim,
        "mamba_d_conv": mixer.kernel,
    }


def _written_kinds(spec: ModelSpec) -> list[str]:
    return [_RECURRENT if layer.mixer.is_recurrent else _ATTENDING for layer in spec.layers]


def _edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    counts = ("num_local_experts", "intermediate_size", "num_experts_per_tok", "layer_types")
    return written_config.moe_edited(spec, config, *counts)


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    """The keys; a layer without key-value heads is one of Mamba-2."""
    return {
        **llama_cpp.usual_keys(spec),
        **granite.gguf_factors(spec),
        "expert_shared_feed_forward_length": _width(spec),
        "attention.head_count_kv": mamba2.head_counts(spec),
        **mamba2.gguf_keys(spec),
    }


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    """The settings; files of whichever spelling say whether queries and keys are turned."""
    attention, attends = from_gguf.attention_of_some_layers(keys)
    turns = is_turned(keys)
    of_mamba = {"heads": "mamba_n_heads", "groups": "mamba_n_groups", "head_dim": "mamba_d_head"}
    return {
        **from_gguf.model_settings(keys),
        **attention,
        **granite.factors_from_keys(keys),
        **mamba2.from_keys(keys, **of_mamba, state="mamba_d_state", kernel="mamba_d_conv"),
        **(rope_settings(keys, attention["head_dim"]) if turns else {}),
        "position_embedding_type": "rope" if turns else "nope",
        "layer_types": [_ATTENDING if it_does else _RECURRENT for it_does in attends],
        "num_local_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"),
        "intermediate_size": keys.count("feed_forward_length"),
        "shared_intermediate_size": keys.count("expert_shared_feed_forward_length"),
    }


def _refusal(spec: ModelSpec) -> str | None:
    mixer = next((layer.mixer for layer in spec.layers if isinstance(layer.mixer, Mamba2)), None)
    if mixer is not None and mixer.width != 2 * spec.hidden_size:
        return (
            f"graph needs heads of Mamba-2 that are twice as wide as the hidden size, {spec.hidden_size}, together; "
            f"those of this model are {mixer.width}"
        )
    return mamba2.limits(spec)


FAMILY = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    read=_read,
    edited=_edited,
    settings=_settings,
    gguf=GgufFamily("granitehybrid", _keys, _refusal, takes_rope_factors=True, switches_rope=True, settings=_from_gguf),
)
