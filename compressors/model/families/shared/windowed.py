"""Layers with a window, whose queries and keys are turned, among layers without one, where they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.description.family import GgufValue
from compressors.model.description.mixers import GroupedQuery
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError
from compressors.model.families.shared import from_gguf

__all__ = ["absent_keys", "from_keys", "gguf_keys", "mixers"]

_USUAL_INTERVAL = 4
"""Of so many layers the last has no window, if a GGUF file does not say otherwise."""


def mixers(settings: FamilySettings, attention: GroupedQuery, interval: str) -> list[GroupedQuery]:
    """The mixer of each layer.

    Args:
        settings: the family's settings.
        attention: a turned layer's, without the window.
        interval: the setting that says which layers have no window where no list does.

    Raises:
        UnsupportedError: no layer has a window.
    """
    windows = settings.layer_windows(_usual_kinds(settings, interval))
    if not any(windows):
        raise UnsupportedError(
            f"{settings.settings.path}: by layer_types or {interval} none of the {len(windows)} layers has a window, "
            "so that no layer would know the order of tokens"
        )
    return [replace(attention, window=window, rope=attention.rope if window else None) for window in windows]


def _usual_kinds(settings: FamilySettings, interval: str) -> list[str]:
    if settings.settings.get("layer_types") is not None:
        settings.ignore(interval)
        return []
    every = settings.count(interval)
    n_layers = settings.count("num_hidden_layers")
    return ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(n_layers)]


def gguf_keys(spec: ModelSpec) -> dict[str, GgufValue]:
    """The window, and the layers that have it."""
    windows = [layer.mixer.window for layer in spec.layers]
    return {
        "attention.sliding_window": max(window or 0 for window in windows),
        "attention.sliding_window_pattern": tuple(window is not None for window in windows),
    }


def absent_keys(spec: ModelSpec) -> dict[str, GgufValue]:
    """The layers with a window in a file that does not name them, as llama.cpp's converter leaves them out."""
    return {"attention.sliding_window_pattern": _usual_pattern(spec.n_layers)}


def from_keys(keys: GgufKeys) -> dict[str, Any]:
    """The window and the kinds of layers, made of a file's keys: the inverse of :func:`gguf_keys`."""
    return from_gguf.window_settings(keys, _usual_pattern(from_gguf.n_layers(keys)))


def _usual_pattern(n_layers: int) -> tuple[bool, ...]:
    return tuple((index + 1) % _USUAL_INTERVAL != 0 for index in range(n_layers))
