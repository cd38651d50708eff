"""Descriptions of models without files: like another one's, except for a few numbers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from compressors.model.description.feed_forward import Dense
from compressors.model.description.roles import Role
from compressors.model.description.rope import Rope
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.families.shared.parts import dense_tensors
from compressors.model.sources.hugging_face.checkpoint import Checkpoint

__all__ = ["EMBEDDING_SCALE", "LOGIT_DIVISOR", "altered", "with_dense_layers", "with_factors"]

EMBEDDING_SCALE, LOGIT_DIVISOR = 4.0, 2.0
"""Powers of two, so that no value is rounded."""

_OF_MIXER = ("n_heads", "n_kv_heads", "head_dim", "rope", "window")
_OF_EXPERTS = ("n_experts", "top_k", "expert_width", "normalizes")


def altered(spec: ModelSpec, *, n_layers: int | None = None, **changes: Any) -> ModelSpec:
    """Changes numbers of a description, those of mixers and experts in all layers.

    Args:
        spec: the description.
        n_layers: layers, all of which are like the first.
        changes: fields of the description, of its mixers (``n_heads``, ``head_dim``, ``rope``, ...), and of its experts
            (``n_experts``, ``top_k``, ``expert_width``, ``normalizes``).
    """
    of_mixer = {name: changes.pop(name) for name in _OF_MIXER if name in changes}
    of_experts = {name: changes.pop(name) for name in _OF_EXPERTS if name in changes}
    hidden_size = changes.get("hidden_size", spec.hidden_size)
    layers = spec.layers if n_layers is None else (spec.layers[0],) * n_layers
    return replace(
        spec, layers=tuple(_altered_layer(layer, of_mixer, of_experts, hidden_size) for layer in layers), **changes
    )


def _altered_layer(
    layer: LayerSpec, of_mixer: dict[str, Any], of_experts: dict[str, Any], hidden_size: int
) -> LayerSpec:
    if "head_dim" in of_mixer and "rope" not in of_mixer:
        assert isinstance(layer.mixer.rope, Rope)
        of_mixer = of_mixer | {"rope": replace(layer.mixer.rope, width=of_mixer["head_dim"])}
    layer = replace(layer, mixer=replace(layer.mixer, **of_mixer), hidden_size=hidden_size)
    if layer.routed is None or not of_experts:
        return layer
    changes = dict(of_experts)
    if "expert_width" in changes:
        changes["width"] = changes.pop("expert_width")
    if "normalizes" in changes:
        changes["routing"] = replace(layer.routed.routing, normalizes=changes.pop("normalizes"))
    return replace(layer, feed_forward=replace(layer.routed, **changes))


def with_dense_layers(spec: ModelSpec, n_layers: int, width: int = 64) -> ModelSpec:
    """Gives the first layers of a description one dense feed-forward each, as DeepSeek's and GLM's have it."""
    return replace(
        spec,
        layers=tuple(
            replace(
                layer,
                feed_forward=Dense(width),
                tensors=(*(each for each in layer.shared_tensors if each.role is not Role.ROUTER), *dense_tensors()),
            )
            if index < n_layers
            else layer
            for index, layer in enumerate(spec.layers)
        ),
    )


def with_factors(folder: Path, new: Path) -> Checkpoint:
    """A copy of a checkpoint in one file, with a head of its own, that computes the same with factors.

    Its embedding is smaller by :data:`EMBEDDING_SCALE` and its head larger by :data:`LOGIT_DIVISOR`.
    """
    shutil.copytree(folder, new)
    tensors = load_file(new / "model.safetensors")
    tensors["model.embed_tokens.weight"] /= EMBEDDING_SCALE
    tensors["lm_head.weight"] *= LOGIT_DIVISOR
    save_file(tensors, new / "model.safetensors")
    checkpoint = Checkpoint(new)
    checkpoint.spec = replace(checkpoint.spec, embedding_scale=EMBEDDING_SCALE, logit_divisor=LOGIT_DIVISOR)
    return checkpoint
