"""Compares the description that was read from ``config.json`` with transformers' own reading of the same file.

A safety net for :mod:`compressors.model.config.reading`: if a version of transformers reads a setting in another way,
the run ends with the setting's name before a weight is read, not with a file that computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from compressors.model.config.reading import WITHOUT_EFFECT, model_settings, transformers_config
from compressors.model.config.settings import Settings
from compressors.model.description.family import Family
from compressors.model.description.mixers import GroupedQuery
from compressors.model.description.rope import Rope, RopeKind
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError
from compressors.model.names import shown

__all__ = ["check_against_transformers"]


def check_against_transformers(settings: Mapping[str, Any], path: Path, spec: ModelSpec) -> None:
    """Checks that transformers would compute with the same settings.

    Args:
        settings: the model's, as ``config.json`` has them.
        path: the file that they are from, for messages.
        spec: as they were read; whether the head is tied, the weights decide.

    Raises:
        UnsupportedError: transformers refuses the file, or a setting differs; the message names it.
    """
    try:
        config = transformers_config(settings)
        config.standardize_rope_params()
    except Exception as error:  # strict configurations raise many kinds, and nothing else can fail here
        lines = " ".join(str(error).split())
        raise UnsupportedError(f"{path}: transformers refuses it ({lines})") from None
    family, read = model_settings(settings, path)
    assert family.read is not None, "families in the registry are read"
    family.read(read)
    _refuse_not_understood(config, family, read)
    for name, ours, theirs in _readings(config, read, spec):
        if ours != theirs:
            raise UnsupportedError(
                f"{path}: {name} is {ours!r} as this tool reads it, and {theirs!r} as the installed transformers does: "
                "write it as the newest transformers does"
            )


def _refuse_not_understood(config: Any, family: Family, settings: Settings) -> None:
    """Refuses a setting of transformers' class that the family's description does not know, and that is no default."""
    from transformers import PreTrainedConfig

    default = type(config)()
    of_any_class = {field.name for field in fields(PreTrainedConfig)}
    for name in sorted({field.name for field in fields(config)} - of_any_class - WITHOUT_EFFECT):
        if name in settings.raw and name not in settings.asked and getattr(config, name) != getattr(default, name):
            raise UnsupportedError(
                f"{settings.named(name)} is {shown(settings.raw[name])}, a setting of {family.architecture} that this "
                "tool does not know: what it would write might compute something else"
            )


_READ_IN_PARTS = frozenset(
    {
        "sliding_window",
        *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
    }
)
"""Settings that are not compared by themselves: windows are by layer, and the rotary embedding is by its angles."""


def _readings(config: Any, settings: Settings, spec: ModelSpec) -> Iterator[tuple[str, object, object]]:
    """Yields the names of settings, with the value by which the family goes, and transformers'."""
    if _value(config, "head_dim") is None:  # transformers' functions do not all work it out
        config.head_dim = config.hidden_size // config.num_attention_heads
    for name, value in settings.values.items():
        if name not in _READ_IN_PARTS and (theirs := _value(config, name, _NOTHING)) is not _NOTHING:
            yield name, value, theirs
    if getattr(config, "is_heterogeneous", False):
        yield "per_layer_config", *_heads_by_layer(config, spec)
    windows = _windows(config, spec, by_kind="layer_types" in settings.values)
    ours = tuple(layer.mixer.window for layer in spec.layers)
    yield "sliding_window", *((ours, windows) if len({*ours, *windows}) > 1 else (ours[0], windows[0]))
    if spec.rope is None:
        return
    if _has_kinds(config.rope_parameters):
        by_layer = (layer.mixer.rope for layer in spec.layers)
        ropes = {(kind, rope) for kind, rope in zip(config.layer_types, by_layer, strict=True) if rope is not None}
        for kind, rope in sorted(ropes, key=lambda entry: entry[0]):
            yield from _rope_settings(config.per_layer_config[kind], config.rope_parameters[kind], rope, kind)
    else:
        yield from _rope_settings(config, config.rope_parameters, spec.rope)


def _has_kinds(rope_parameters: Mapping[str, Any]) -> bool:
    """True if each kind of layers has an object of its own inside."""
    return any(isinstance(value, dict) for value in rope_parameters.values())


_NOTHING = object()


def _value(config: Any, name: str, absent: object = None) -> object:
    """A setting; where layers differ in it, the value of all others, which transformers' attribute refuses to give."""
    return vars(config)[name] if name in vars(config) else getattr(config, name, absent)


def _heads_by_layer(config: Any, spec: ModelSpec) -> tuple[object, object]:
    """The heads of each layer as they were read, and as transformers has them, where its layers differ."""
    ours = [
        (layer.mixer.n_kv_heads, layer.mixer.head_dim) for layer in spec.layers if isinstance(layer.mixer, GroupedQuery)
    ]
    theirs = [(layer.num_key_value_heads, layer.head_dim) for layer in config.per_layer_config]
    return ours, theirs


def _windows(config: Any, spec: ModelSpec, *, by_kind: bool) -> tuple[int | None, ...]:
    """The window of each layer in transformers; ``by_kind`` says that the family heeds the kinds of layers."""
    window = getattr(config, "sliding_window", None) or None  # 0 is none too
    if not by_kind:
        return (window,) * spec.n_layers
    return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)


def _rope_settings(
    config: Any, parameters: Mapping[str, Any], rope: Rope, layer_kind: str | None = None
) -> Iterator[tuple[str, object, object]]:
    """The kind and the numbers that the angles are computed from, which are compared as frequencies.

    Args:
        config: the settings of the layers that turn by it.
        parameters: those of the embedding.
        rope: as the family read it.
        layer_kind: the kind of layers that the embedding is for; None: it is for all.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, theta = _kind_and_base(parameters, rope)
    yield "rope_type", rope.kind.value, kind
    yield "rope_theta", rope.theta, theta
    if rope.share != 1.0:  # classes that turn whole heads do not read it
        yield "partial_rotary_factor", rope.share, parameters.get("partial_rotary_factor", 1.0)
    if rope.kind is RopeKind.DEFAULT:
        return
    of_kind = {} if layer_kind is None else {"layer_type": layer_kind}
    for n_tokens in (1, rope.original_context + 1, 2 * config.max_position_embeddings):
        theirs, attention_factor = ROPE_INIT_FUNCTIONS[rope.kind.value](config, None, seq_len=n_tokens, **of_kind)
        yield "attention_factor", rope.attention_factor, float(attention_factor)
        same = torch.equal(rope.inverse_frequencies(n_tokens), theirs)
        yield "rope_parameters", rope.in_config(), rope.in_config() if same else parameters


def _kind_and_base(parameters: Mapping[str, Any], rope: Rope) -> tuple[str, float]:
    """The kind and the base in transformers; a family may read a base that ``alpha`` stretches as another base."""
    kind, theta = parameters["rope_type"], float(parameters["rope_theta"])
    if rope.kind is RopeKind.DEFAULT and kind == RopeKind.DYNAMIC and parameters.get("alpha"):
        return RopeKind.DEFAULT.value, theta * parameters["alpha"] ** (rope.width / (rope.width - 2))
    return kind, theta
