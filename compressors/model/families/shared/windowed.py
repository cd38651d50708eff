"""Layers with a window, whose queries and keys are turned, among layers without one, where they are not."""

from __future__ import annotations

from dataclasses import replace

from compressors.model.config.family_settings import FamilySettings
from compressors.model.description.family import GgufValue
from compressors.model.description.mixers import GroupedQuery
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError

__all__ = ["gguf_keys", "mixers"]


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
