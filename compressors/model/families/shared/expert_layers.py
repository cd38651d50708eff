"""Experts beside a shared one that is as wide as a number of them, in all layers or behind leading dense ones.

Most models score experts by sigmoids, and add a bias to the scores for the choice; some choose groups of experts first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.description.family import ConfigValues, GgufValue, SkippedPart
from compressors.model.description.feed_forward import Dense, Routed, Shared
from compressors.model.description.mixers import Mixer
from compressors.model.description.mtp import MTP_PART
from compressors.model.description.roles import Role
from compressors.model.description.routing import GroupScore, Routing, Score
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import TensorSpec
from compressors.model.errors import InputError
from compressors.model.families.shared import from_gguf, llama_cpp, parts, written_config
from compressors.model.families.shared.next_token import mtp_layer

__all__ = [
    "MTP",
    "USUAL",
    "Spelling",
    "absent_keys",
    "biased_sigmoid_experts",
    "dense_kinds",
    "edited",
    "from_keys",
    "gguf_keys",
    "kinds_of_dense",
    "layers",
    "leading_dense",
    "mtp",
    "settings",
    "settings_beside_attention",
    "tensors",
    "with_groups",
]

MTP = SkippedPart(r"model\.layers\.(?P<layer>\d+)\..*", MTP_PART)

_N_MTP = ("num_nextn_predict_layers", "num_mtp_layers")
"""Settings of the number of such layers."""


def mtp(spec: ModelSpec) -> LayerSpec:
    """The layer that predicts one more token, behind the decoder layers and numbered like them."""
    return mtp_layer(spec, _MTP_PREFIX, _MTP_NAMES)


_MTP_PREFIX = "model.layers.{layer}."
_MTP_NAMES = {
    Role.MTP_PROJECTION: f"{_MTP_PREFIX}eh_proj.weight",
    Role.MTP_EMBEDDING_NORM: f"{_MTP_PREFIX}enorm.weight",
    Role.MTP_STATE_NORM: f"{_MTP_PREFIX}hnorm.weight",
    Role.MTP_OUTPUT_NORM: f"{_MTP_PREFIX}shared_head.norm.weight",
    Role.MTP_EMBEDDING: f"{_MTP_PREFIX}embed_tokens.weight",
    Role.MTP_HEAD: f"{_MTP_PREFIX}shared_head.head.weight",
}


@dataclass(frozen=True)
class Spelling:
    """The keys of ``config.json`` that families spell differently.

    Attributes:
        n_experts: the number of routed experts.
        alias: transformers' other key of that number; None: there is none.
        n_shared: the number of routed experts that the shared one is as wide as.
        scale: the factor of the weights.
    """

    n_experts: str = "n_routed_experts"
    alias: str | None = "num_local_experts"
    n_shared: str = "n_shared_experts"
    scale: str = "routed_scaling_factor"


USUAL = Spelling()
"""The keys of most families."""


def biased_sigmoid_experts(
    settings: FamilySettings,
    spelling: Spelling = USUAL,
    *,
    normalizes_by_default: bool = True,
    scoring: Sequence[str] = ("sigmoid",),
) -> Routed:
    """Reads experts that are scored by sigmoids, with a bias for the choice and with groups.

    Args:
        settings: the family's settings.
        spelling: its keys.
        normalizes_by_default: transformers' default of ``norm_topk_prob``.
        scoring: the values of ``scoring_func`` that its files have, which transformers' class does not read.
    """
    settings.require("hidden_act", "silu", "swish")
    settings.require("scoring_func", *scoring)
    settings.require("topk_method", "noaux_tc")
    n_experts = settings.count_of(*(key for key in (spelling.alias, spelling.n_experts) if key is not None))
    top_k, width = settings.top_k(n_experts), settings.count("moe_intermediate_size")
    routing = Routing(
        Score.SIGMOID,
        has_selection_bias=True,
        group_score=GroupScore.BEST_TWO,
        normalizes=settings.flag("norm_topk_prob", default=normalizes_by_default),
        epsilon=1e-20,
        scale=settings.number(spelling.scale),
    )
    return parts.routed_in_mlp(
        n_experts=n_experts,
        top_k=top_k,
        width=width,
        routing=with_groups(settings, routing, n_experts, top_k, spelling),
        shared=Shared(width * settings.count(spelling.n_shared)),
    )


def with_groups(
    settings: FamilySettings, routing: Routing, n_experts: int, top_k: int, spelling: Spelling = USUAL
) -> Routing:
    """The rule with the groups of experts that it chooses first.

    Raises:
        InputError: transformers' class cannot choose from such groups, or leaves some of a token's experts to chance.
    """
    n_groups, n_chosen, key = settings.count("n_group"), settings.count("topk_group"), spelling.n_experts
    size, rest = divmod(n_experts, n_groups)
    why = None
    if rest:
        why = f"n_group is {n_groups}, which does not divide the {n_experts} experts of {key}"
    elif n_chosen > n_groups:
        why = f"topk_group is {n_chosen}, more than n_group, {n_groups}"
    elif size < routing.group_score.n_best:
        why = f"n_group is {n_groups}: with {n_experts} experts ({key}) a group has no {routing.group_score}"
    elif n_chosen * size < top_k:
        why = f"topk_group is {n_chosen}: so many groups have fewer experts than num_experts_per_tok, {top_k}"
    if why is not None:
        raise InputError(f"{settings.settings.path}: {why}")
    return replace(routing, n_groups=n_groups, n_chosen_groups=n_chosen)


def leading_dense(settings: FamilySettings, key: str = "first_k_dense_replace") -> list[bool]:
    """Says of each layer whether it is dense, as the first ones are; ``key`` is the setting of their number."""
    n_dense = settings.whole_number(key)
    return [index < n_dense for index in range(settings.count("num_hidden_layers"))]


def tensors(bias: TensorSpec | None, router: TensorSpec | None = None) -> tuple[TensorSpec, ...]:
    """The tensors of the experts.

    Args:
        bias: the bias for the choice; None: there is none.
        router: the router; None: the usual one.
    """
    return (
        parts.router_tensor() if router is None else router,
        *(() if bias is None else (bias,)),
        *parts.expert_tensors(),
        *parts.shared_expert_tensors("mlp.shared_experts"),
    )


def layers(
    settings: FamilySettings,
    mixers: Sequence[Mixer],
    of_mixer: Iterable[TensorSpec],
    experts: Routed,
    of_experts: Iterable[TensorSpec],
    are_dense: Sequence[bool],
    said_by: str,
) -> list[LayerSpec]:
    """Layers of which some are dense.

    Args:
        settings: the family's settings.
        mixers: the mixer of each layer.
        of_mixer: the tensors of the mixer, and the layer's norms.
        experts: the feed-forward of layers that are not dense.
        of_experts: its tensors.
        are_dense: says of each layer whether it is dense.
        said_by: the setting that says so.
    """
    parts.refuse_without_experts(settings, are_dense, said_by)
    if not any(are_dense):
        settings.ignore("intermediate_size")
    feed_forward = Dense(settings.count("intermediate_size")) if any(are_dense) else experts
    of_dense, of_routed = (*of_mixer, *parts.leading_dense_tensors()), (*of_mixer, *of_experts)
    kinds = list(zip(mixers, are_dense, strict=True))
    of_kind = {
        (mixer, is_dense): parts.layer(settings, mixer, feed_forward, of_dense)
        if is_dense
        else parts.layer(settings, mixer, experts, of_routed)
        for mixer, is_dense in dict.fromkeys(kinds)
    }
    return [of_kind[kind] for kind in kinds]


def kinds_of_dense(settings: FamilySettings, usual: list[bool]) -> list[bool]:
    """Says of each layer whether it is dense by ``mlp_layer_types``; ``usual`` counts where that list is absent."""
    kinds = settings.kinds("mlp_layer_types", ("dense", "sparse"))
    are_dense = usual if kinds is None else [kind == "dense" for kind in kinds]
    settings.settings.note("mlp_layer_types", ["dense" if is_dense else "sparse" for is_dense in are_dense])
    return are_dense


def dense_kinds(spec: ModelSpec) -> list[str]:
    """The kinds of layers as ``mlp_layer_types`` names them."""
    return ["dense" if isinstance(layer.feed_forward, Dense) else "sparse" for layer in spec.layers]


def settings(spec: ModelSpec, spelling: Spelling = USUAL) -> dict[str, Any]:
    """The settings of ``config.json`` that describe the feed-forwards, by key."""
    experts = parts.routed(spec)
    found: dict[str, Any] = {
        spelling.n_experts: experts.n_experts,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.width,
        spelling.n_shared: written_config.n_shared_experts(spec),
        spelling.scale: experts.routing.scale,
    }
    return found | written_config.dense_width(spec)


def settings_beside_attention(
    spec: ModelSpec, spelling: Spelling = USUAL, *, normalizes: str | None = "norm_topk_prob"
) -> dict[str, Any]:
    """The settings of a model with grouped-query attention, those of the feed-forwards included, by key.

    Args:
        spec: the model.
        spelling: the family's keys.
        normalizes: the key of the normalisation; None: the family has none.
    """
    usual = written_config.usual_settings(
        spec, n_experts=spelling.n_experts, width="moe_intermediate_size", normalizes=normalizes
    )
    return usual | settings(spec, spelling)


def edited(
    spec: ModelSpec, config: ConfigValues, *by_layer: str, spelling: Spelling = USUAL, absent: Sequence[str] = ()
) -> dict[str, Any]:
    """A ``config.json`` with a student's counts, and without layers for MTP that the student has not.

    Args:
        spec: the student.
        config: the source's settings.
        by_layer: the keys of settings that say which layers are of which kind.
        spelling: the family's keys.
        absent: other settings that are dropped.
    """
    counts = (spelling.n_experts, "moe_intermediate_size", spelling.n_shared, "num_experts_per_tok")
    gone = _N_MTP if spec.mtp is None else ()
    others = {key: 0 if key in gone else value for key, value in config.items() if key not in absent}
    return written_config.moe_edited(spec, others, *counts, *by_layer, other_spelling=spelling.alias)


def gguf_keys(spec: ModelSpec) -> dict[str, GgufValue]:
    """The keys of the feed-forwards.

    The rule for scores is always written, as the graphs' defaults differ; groups only where they are a choice.
    """
    experts = parts.routed(spec)
    rule = experts.routing
    keys: dict[str, GgufValue] = {
        "expert_count": experts.n_experts,
        "expert_used_count": experts.top_k,
        "expert_feed_forward_length": experts.width,
        "expert_shared_count": written_config.n_shared_experts(spec),
        "expert_weights_scale": rule.scale,
        "expert_weights_norm": rule.normalizes,
        "expert_gating_func": llama_cpp.GATING_FUNCTIONS[rule.score],
        "leading_dense_block_count": parts.n_dense(spec),
    }
    if rule.n_chosen_groups < rule.n_groups:
        keys |= {"expert_group_count": rule.n_groups, "expert_group_used_count": rule.n_chosen_groups}
    return keys


def from_keys(keys: GgufKeys, spelling: Spelling = USUAL, *, normalizes: str = "norm_topk_prob") -> dict[str, Any]:
    """The settings of the feed-forwards, made of a file's keys: the inverse of :func:`gguf_keys`.

    Args:
        keys: the file's.
        spelling: the family's keys in ``config.json``.
        normalizes: the family's key of the normalisation.
    """
    return {
        **from_gguf.dense_width(keys),
        spelling.n_shared: keys.count("expert_shared_count"),
        spelling.scale: keys.number("expert_weights_scale", 1.0),
        normalizes: keys.flag("expert_weights_norm", default=False),
        "n_group": keys.count("expert_group_count", 1) or 1,
        "topk_group": keys.count("expert_group_used_count", 1) or 1,
    }


def absent_keys(_spec: ModelSpec) -> dict[str, GgufValue]:
    """llama.cpp's values of keys of the feed-forwards that a file leaves out."""
    return {
        "expert_gating_func": llama_cpp.GATING_FUNCTIONS[Score.SIGMOID],
        "expert_weights_norm": False,
        "expert_weights_scale": 1.0,
        "leading_dense_block_count": 0,
    }
