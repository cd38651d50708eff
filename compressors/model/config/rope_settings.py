"""Reads a model's rotary embedding from ``config.json`` as transformers' configurations do.

``RotaryEmbeddingConfigMixin`` in transformers' ``modeling_rope_utils.py``: an object under ``rope_scaling`` replaces
``rope_parameters`` as a whole; a value that it lacks comes from the top level, then from the family's default; and
``original_max_position_embeddings`` at the top level goes before one inside. The settings of a kind of layer have an
object of their own inside; only their base and share may stand at the top level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from compressors.model.config.settings import Settings
from compressors.model.description.rope import Rope, RopeKind, attention_multiplier
from compressors.model.errors import UnsupportedError
from compressors.model.names import shown

__all__ = ["RopeRule", "read_rope"]

_ORIGINAL = "original_max_position_embeddings"
_SHARE = "partial_rotary_factor"
_WITH_ORIGINAL_CONTEXT = (RopeKind.YARN, RopeKind.LONGROPE, RopeKind.LLAMA3)
_WIDEST_HEAD = 1 << 14  # no real head is wider, and a table of its angles would only eat memory


@dataclass(frozen=True)
class RopeRule:
    """How a family's classes of transformers read and use the settings.

    Attributes:
        default_theta: the base where none is written.
        default_share: the turned share of a head where none is written; None: the classes turn whole heads.
        layer_kind: the key inside the settings that holds those for the layers in question; None: all layers are alike.
        takes_alpha: ``alpha`` stretches the base once and for all, whatever the length of a text.
        scales_attention: ``mscale_all_dim`` changes the factor of the products of queries and keys, too.
        interleaved: pairs are neighbours.
        default: the settings that count where the file has none; None: nothing is scaled.
    """

    default_theta: float = 10_000.0
    default_share: float | None = None
    layer_kind: str | None = None
    takes_alpha: bool = False
    scales_attention: bool = False
    interleaved: bool = False
    default: Mapping[str, Any] | None = None


def read_rope(config: Settings, rule: RopeRule, *, head_dim: int, trained_context: int) -> Rope:
    """Reads a rotary embedding.

    Args:
        config: the settings of the model.
        rule: the family's rule for reading them.
        head_dim: values of a head, or of the part of it that is set aside for turning.
        trained_context: ``max_position_embeddings``.

    Raises:
        InputError: a value is missing or of the wrong type.
        UnsupportedError: the kind of scaling is unknown to transformers, or cannot be computed.
    """
    scaling = config.objects("rope_scaling")
    parameters = config.objects("rope_parameters")
    outer = scaling if scaling.raw else parameters
    if not outer.raw and rule.default is not None and config.get("rope_parameters") is None:
        outer = Settings(rule.default, config.path, "rope_parameters")
    chosen = _of_layer_kind(outer, rule.layer_kind)
    kind = _kind(chosen)
    theta_owner = chosen if "rope_theta" in chosen else config
    share = _share(config, chosen, kind, rule, head_dim)
    width = head_dim if kind is RopeKind.PROPORTIONAL else int(head_dim * share)
    plain = Rope(
        kind, theta_owner.number("rope_theta", rule.default_theta), width, share=share, interleaved=rule.interleaved
    )
    if kind is RopeKind.DEFAULT:
        return plain  # transformers' default ignores everything else
    if rule.takes_alpha and kind is RopeKind.DYNAMIC and chosen.raw.get("alpha"):
        return _stretched(plain, chosen)
    if kind in _WITH_ORIGINAL_CONTEXT:
        original = config if _ORIGINAL in config and chosen is outer else chosen
        plain = replace(plain, original_context=original.count(_ORIGINAL, trained_context))
    rope = _scaled(plain, outer, chosen, rule, trained_context)
    _refuse_impossible(rope, chosen)
    return rope


def _scaled(plain: Rope, outer: Settings, chosen: Settings, rule: RopeRule, trained_context: int) -> Rope:
    rope = _READERS[plain.kind](plain, chosen, trained_context)
    if plain.kind is RopeKind.YARN:  # transformers' function looks for this one beside the kinds of layers, not in them
        rope = replace(rope, truncate=bool(outer.raw.get("truncate", True)))
    if rule.scales_attention and chosen.raw.get("mscale_all_dim"):
        chosen.number("factor")  # transformers' attention takes it from here, where angles can do without it
        rope = replace(rope, all_dim_multiplier=chosen.number("mscale_all_dim"))
    return rope


def _kind(chosen: Settings) -> RopeKind:
    key = "rope_type" if "rope_type" in chosen else "type"
    value = chosen.raw.get(key, "default")
    if not isinstance(value, str) or value not in list(RopeKind):
        raise UnsupportedError(
            f"{chosen.named(key)} is {shown(value)}; the rotary embeddings that are understood are "
            f"{', '.join(RopeKind)}. The model was trained with its own, so it cannot be left out"
        )
    return RopeKind(value)


def _of_layer_kind(settings: Settings, layer_kind: str | None) -> Settings:
    """The settings for a kind of layer; if the file does not tell kinds apart, these are for all layers.

    Raises:
        UnsupportedError: there are settings for kinds of layers, but none for this one.
    """
    nested = [key for key, value in settings.raw.items() if isinstance(value, dict)]
    if not nested:
        return settings
    if layer_kind is None:
        raise UnsupportedError(
            f"{settings.named(nested[0])} is an object: a rotary embedding of its own for a kind of layer is not "
            "supported"
        )
    if layer_kind not in nested:
        raise UnsupportedError(
            f"{settings.named(layer_kind)} is missing, and others are for {', '.join(nested)}: these layers could not "
            "be turned"
        )
    return settings.objects(layer_kind)


def _share(config: Settings, chosen: Settings, kind: RopeKind, rule: RopeRule, head_dim: int) -> float:
    """The share of a head that is turned.

    Raises:
        UnsupportedError: transformers cannot run such a model.
    """
    if rule.default_share is None and kind is RopeKind.DEFAULT:
        return 1.0  # classes that turn whole heads do not read it
    owner = chosen if _SHARE in chosen else config
    share = owner.number_or_null(_SHARE)
    if share is None and owner is chosen:
        raise _no_share(owner, "it must be a number")
    if share is None:  # null at the top level stands for none
        share = 1.0 if rule.default_share is None or _SHARE in owner else rule.default_share
    if kind is RopeKind.PROPORTIONAL and share <= 1:
        return share
    if rule.default_share is None and int(head_dim * share) != head_dim:
        raise _no_share(owner, "this family turns whole heads, so transformers cannot run such a model either")
    if share > 1 or not int(head_dim * share) or int(head_dim * share) % 2:
        raise _no_share(owner, f"of heads of {head_dim} values that is not a number of pairs")
    return share


def _no_share(owner: Settings, why: str) -> UnsupportedError:
    return UnsupportedError(f"{owner.named(_SHARE)} is {shown(owner.raw.get(_SHARE))}; {why}")


def _stretched(rope: Rope, chosen: Settings) -> Rope:
    """Returns the same angles as an unscaled embedding of another base."""
    stretched = rope.theta * chosen.number("alpha") ** (rope.width / (rope.width - 2))
    return replace(rope, kind=RopeKind.DEFAULT, theta=stretched)


def _linear(rope: Rope, chosen: Settings, _trained_context: int) -> Rope:
    return replace(rope, factor=chosen.number("factor"))


def _dynamic(rope: Rope, chosen: Settings, trained_context: int) -> Rope:
    return replace(rope, factor=chosen.number("factor"), trained_context=trained_context)


def _yarn(rope: Rope, chosen: Settings, trained_context: int) -> Rope:
    """Reads YaRN: a null factor means the ratio of the contexts, an absent attention factor means the paper's."""
    ratio = trained_context / rope.original_context
    factor = ratio if "factor" in chosen and chosen.raw["factor"] is None else chosen.number("factor")
    attention_factor = chosen.number_or_null("attention_factor")
    scale, scale_all = chosen.raw.get("mscale"), chosen.raw.get("mscale_all_dim")
    if attention_factor is None and scale and scale_all:
        attention_factor = float(
            attention_multiplier(factor, chosen.number("mscale"))
            / attention_multiplier(factor, chosen.number("mscale_all_dim"))
        )
    return replace(
        rope,
        factor=factor,
        attention_factor=attention_multiplier(factor) if attention_factor is None else attention_factor,
        beta_fast=chosen.number("beta_fast") if chosen.raw.get("beta_fast") else 32.0,
        beta_slow=chosen.number("beta_slow") if chosen.raw.get("beta_slow") else 1.0,
    )


def _longrope(rope: Rope, chosen: Settings, trained_context: int) -> Rope:
    factor = chosen.number_or_null("factor") or trained_context / rope.original_context
    attention_factor = chosen.number_or_null("attention_factor")
    if attention_factor is None:
        known = factor <= 1 or rope.original_context == 1
        attention_factor = 1.0 if known else math.sqrt(1 + math.log(factor) / math.log(rope.original_context))
    return replace(
        rope,
        factor=factor,
        attention_factor=attention_factor,
        short_factors=chosen.numbers("short_factor", rope.width // 2),
        long_factors=chosen.numbers("long_factor", rope.width // 2),
    )


def _llama3(rope: Rope, chosen: Settings, _trained_context: int) -> Rope:
    low, high = chosen.number("low_freq_factor"), chosen.number("high_freq_factor")
    if high == low:
        raise UnsupportedError(f"{chosen.named('high_freq_factor')} equals low_freq_factor: there is nothing between")
    return replace(rope, factor=chosen.number("factor"), low_frequency_factor=low, high_frequency_factor=high)


def _proportional(rope: Rope, chosen: Settings, _trained_context: int) -> Rope:
    return replace(rope, factor=chosen.number("factor", 1.0))


_READERS = {
    RopeKind.LINEAR: _linear,
    RopeKind.DYNAMIC: _dynamic,
    RopeKind.YARN: _yarn,
    RopeKind.LONGROPE: _longrope,
    RopeKind.LLAMA3: _llama3,
    RopeKind.PROPORTIONAL: _proportional,
}


def _refuse_impossible(rope: Rope, chosen: Settings) -> None:
    """Refuses numbers that are each fine, but together divide by zero or leave the range of float32."""
    try:
        if rope.width <= _WIDEST_HEAD and rope.inverse_frequencies(1).isfinite().all():
            return
    except (ArithmeticError, ValueError):
        pass
    raise UnsupportedError(
        f"{chosen.named('rope_type')} {rope.kind.value}: no angles can be computed with these numbers "
        f"(rope_theta {rope.theta:g}, factor {rope.factor:g}, heads of {rope.width})"
    )
