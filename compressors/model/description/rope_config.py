"""Reads a model's rotary embedding from ``config.json`` as transformers' configurations do.

``RotaryEmbeddingConfigMixin`` in transformers' ``modeling_rope_utils.py``: an object under ``rope_scaling`` takes the
place of ``rope_parameters``, whole; what it lacks comes from the top level, then from the family's default; and
``original_max_position_embeddings`` at the top level goes before one inside.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from compressors.model.description.rope import Rope, RopeKind
from compressors.model.description.settings import Settings
from compressors.model.errors import UnsupportedError
from compressors.model.names import shown

__all__ = ["read_rope"]

_ORIGINAL = "original_max_position_embeddings"
_WITH_ORIGINAL_CONTEXT = (RopeKind.YARN, RopeKind.LONGROPE, RopeKind.LLAMA3)
_WIDEST_HEAD = 1 << 14  # beyond it no head is real, and a table of its angles would only eat memory


def read_rope(config: Settings, *, head_dim: int, trained_context: int, default_theta: float) -> Rope:
    """Reads the embedding of heads of ``head_dim`` values; ``trained_context`` is ``max_position_embeddings``.

    Raises:
        InputError: a value is missing or of the wrong type.
        UnsupportedError: the kind of scaling is unknown to transformers, or cannot be computed.
    """
    scaling = config.objects("rope_scaling")
    parameters = config.objects("rope_parameters")
    chosen = scaling if scaling.raw else parameters
    _refuse_by_layer_type(chosen)
    kind = _kind(chosen)
    theta_owner = chosen if "rope_theta" in chosen else config
    plain = Rope(kind, theta_owner.number("rope_theta", default_theta), head_dim)
    if kind is RopeKind.DEFAULT:
        return plain  # transformers' default ignores everything else, partial_rotary_factor included
    _refuse_partial(config, chosen, head_dim)
    if kind in _WITH_ORIGINAL_CONTEXT:
        original = config if _ORIGINAL in config else chosen
        plain = replace(plain, original_context=original.count(_ORIGINAL, trained_context))
    rope = _READERS[kind](plain, chosen, trained_context)
    _refuse_impossible(rope, chosen)
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


def _refuse_by_layer_type(chosen: Settings) -> None:
    for key, value in chosen.raw.items():
        if isinstance(value, dict):
            raise UnsupportedError(
                f"{chosen.named(key)} is an object: a rotary embedding of its own for a kind of layer is not supported"
            )


def _refuse_partial(config: Settings, chosen: Settings, head_dim: int) -> None:
    """transformers' classes of these families turn whole heads, and fail where the scaling is for a part of them."""
    owner = chosen if "partial_rotary_factor" in chosen else config
    share = owner.number_or_null("partial_rotary_factor")
    if share is None and owner is config:
        return
    if share is None or int(head_dim * share) != head_dim:
        raise UnsupportedError(
            f"{owner.named('partial_rotary_factor')} is {shown(share)}; this family turns whole heads, so transformers "
            "cannot run such a model either"
        )


def _linear(rope: Rope, chosen: Settings, _trained_context: int) -> Rope:
    return replace(rope, factor=chosen.number("factor"))


def _dynamic(rope: Rope, chosen: Settings, trained_context: int) -> Rope:
    return replace(rope, factor=chosen.number("factor"), trained_context=trained_context)


def _yarn(rope: Rope, chosen: Settings, trained_context: int) -> Rope:
    """A factor that is null stands for the ratio of the contexts; the paper's attention factor for one left out."""
    ratio = trained_context / rope.original_context
    factor = ratio if "factor" in chosen and chosen.raw["factor"] is None else chosen.number("factor")
    attention_factor = chosen.number_or_null("attention_factor")
    scale, scale_all = chosen.raw.get("mscale"), chosen.raw.get("mscale_all_dim")
    if attention_factor is None and scale and scale_all:
        attention_factor = float(
            _attention_scale(factor, chosen.number("mscale"))
            / _attention_scale(factor, chosen.number("mscale_all_dim"))
        )
    return replace(
        rope,
        factor=factor,
        attention_factor=_attention_scale(factor) if attention_factor is None else attention_factor,
        beta_fast=chosen.number("beta_fast") if chosen.raw.get("beta_fast") else 32.0,
        beta_slow=chosen.number("beta_slow") if chosen.raw.get("beta_slow") else 1.0,
        truncate=bool(chosen.raw.get("truncate", True)),
    )


def _attention_scale(factor: float, multiplier: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


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


_READERS = {
    RopeKind.LINEAR: _linear,
    RopeKind.DYNAMIC: _dynamic,
    RopeKind.YARN: _yarn,
    RopeKind.LONGROPE: _longrope,
    RopeKind.LLAMA3: _llama3,
}


def _refuse_impossible(rope: Rope, chosen: Settings) -> None:
    """Numbers that are each fine may still divide by zero, or leave the range of float32."""
    try:
        if rope.width <= _WIDEST_HEAD and torch.isfinite(rope.inverse_frequencies(1)).all():
            return
    except (ArithmeticError, ValueError):
        pass
    raise UnsupportedError(
        f"{chosen.named('rope_type')} {rope.kind.value}: no angles can be computed with these numbers "
        f"(rope_theta {rope.theta:g}, factor {rope.factor:g}, heads of {rope.width})"
    )
