"""Compares the description that was read from ``config.json`` with transformers' own reading of the same file.

A safety net for :mod:`compressors.model.config.reading`: if a version of transformers reads a setting in another way,
the run ends with the setting's name before any work, not with a file that computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from compressors.model.config.reading import model_settings, transformers_config
from compressors.model.config.settings import Settings
from compressors.model.description.family import Family
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


_WITHOUT_EFFECT = frozenset(
    {
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
        "output_router_logits",
        "pad_token_id",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "use_cache",
    }
)
"""Settings that serve training alone, or that :mod:`compressors.model.config.special_tokens` reads."""


def _refuse_not_understood(config: Any, family: Family, settings: Settings) -> None:
    """Refuses a setting of transformers' class that the family's description does not know, and that is no default."""
    from transformers import PreTrainedConfig

    default = type(config)()
    of_any_class = {field.name for field in fields(PreTrainedConfig)}
    for name in sorted({field.name for field in fields(config)} - of_any_class - _WITHOUT_EFFECT):
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
    if getattr(config, "head_dim", None) is None:  # transformers' functions do not all work it out
        config.head_dim = config.hidden_size // config.num_attention_heads
    for name, value in settings.values.items():
        if name not in _READ_IN_PARTS and hasattr(config, name):
            yield name, value, getattr(config, name)
    windows = _windows(config, spec, by_kind="layer_types" in settings.values)
    ours = tuple(layer.mixer.window for layer in spec.layers)
    yield "sliding_window", *((ours, windows) if len({*ours, *windows}) > 1 else (ours[0], windows[0]))
    if spec.rope is not None:
        yield from _rope_settings(config, spec.rope)


def _windows(config: Any, spec: ModelSpec, *, by_kind: bool) -> tuple[int | None, ...]:
    """The window of each layer in transformers; ``by_kind`` says that the family heeds the kinds of layers."""
    window = getattr(config, "sliding_window", None) or None  # 0 is none too
    if not by_kind:
        return (window,) * spec.n_layers
    return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)


def _rope_settings(config: Any, rope: Rope) -> Iterator[tuple[str, object, object]]:
    """The kind and the numbers that the angles are computed from, which are compared as frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, theta = _kind_and_base(config.rope_parameters, rope)
    yield "rope_type", rope.kind.value, kind
    yield "rope_theta", rope.theta, theta
    if rope.share != 1.0:  # classes that turn whole heads do not read it
        yield "partial_rotary_factor", rope.share, config.rope_parameters.get("partial_rotary_factor", 1.0)
    if rope.kind is RopeKind.DEFAULT:
        return
    for n_tokens in (1, rope.original_context + 1, 2 * config.max_position_embeddings):
        theirs, attention_factor = ROPE_INIT_FUNCTIONS[rope.kind.value](config, None, seq_len=n_tokens)
        yield "attention_factor", rope.attention_factor, float(attention_factor)
        same = torch.equal(rope.inverse_frequencies(n_tokens), theirs)
        yield "rope_parameters", rope.in_config(), rope.in_config() if same else config.rope_parameters


def _kind_and_base(parameters: Mapping[str, Any], rope: Rope) -> tuple[str, float]:
    """The kind and the base in transformers; a family may read a base that ``alpha`` stretches as another base."""
    kind, theta = parameters["rope_type"], float(parameters["rope_theta"])
    if rope.kind is RopeKind.DEFAULT and kind == RopeKind.DYNAMIC and parameters.get("alpha"):
        return RopeKind.DEFAULT.value, theta * parameters["alpha"] ** (rope.width / (rope.width - 2))
    return kind, theta
