"""Finds the layer of a checkpoint that predicts one more token, or says why it cannot be kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.errors import UnsupportedError
from compressors.model.names import shown
from compressors.model.sources.hugging_face.float8 import scales_of

__all__ = ["MODEL_TABLES", "find_mtp", "refuse_more_mtp", "why_no_mtp"]

MODEL_TABLES: Mapping[Role, Role] = {Role.MTP_EMBEDDING: Role.TOKEN_EMBEDDING, Role.MTP_HEAD: Role.HEAD}
"""The tensors of such a layer that checkpoints may leave out, and the model's that it takes in their place."""


def why_no_mtp(spec: ModelSpec, names: Collection[str]) -> str | None:
    """Says why the layer cannot be kept, as far as the names of a checkpoint's tensors tell; None: it can."""
    if spec.family.mtp is None:
        reason = spec.family.why_no_mtp or f"checkpoints of {spec.family.architecture} have no layer for MTP"
        return f"{reason}: leave --keep-mtp out"
    first = spec.family.mtp(spec).tensors[0].name.format(layer=spec.n_layers)
    if first not in names:
        return f"the weights have no layer for MTP (no tensor {first}): leave --keep-mtp out"
    return None


def find_mtp(spec: ModelSpec, names: Collection[str], path: Path) -> LayerSpec:
    """The description of the layer, with those tables that the checkpoint holds.

    Args:
        spec: the model without it.
        names: the names of the checkpoint's tensors.
        path: the checkpoint, for messages.

    Raises:
        UnsupportedError: it cannot be kept.
    """
    reason = why_no_mtp(spec, names)
    if reason is not None:
        raise UnsupportedError(f"{path}: {reason}")
    assert spec.family.mtp is not None
    layer = spec.family.mtp(spec)
    there = (
        tensor
        for tensor in layer.tensors
        if tensor.role not in MODEL_TABLES or tensor.name.format(layer=spec.n_layers) in names
    )
    return replace(layer, tensors=tuple(there))


def refuse_more_mtp(spec: ModelSpec, names: Collection[str], claimed: Collection[str], path: Path) -> None:
    """Refuses a checkpoint with tensors for MTP that the layer does not have, such as those of a second one.

    Args:
        spec: the model.
        names: the names of the checkpoint's tensors.
        claimed: the names of the layer's.
        path: the checkpoint, for messages.

    Raises:
        UnsupportedError: there is such a tensor.
    """
    known = {*claimed, *(scales_of(name, names) for name in claimed)}
    rules = [part for part in spec.family.skipped if part.takes(next(iter(claimed)), spec.n_layers)]
    for name in names:
        if name not in known and any(rule.takes(name, spec.n_layers) for rule in rules):
            raise UnsupportedError(
                f"{path}: tensor {shown(name)} belongs to no layer for MTP that llama.cpp can run: it takes one, made "
                "like a decoder layer that attends. Leave --keep-mtp out"
            )
