"""The layer that predicts one more token (:mod:`compressors.model.description.mtp`), as families describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from compressors.model.description.mtp import MTP_MODULES
from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import GgufTensor, Kind, NormKind, TensorSpec
from compressors.model.description.transforms import SAME, PlusOne

__all__ = ["mtp_layer"]

_GGUF = {
    Role.MTP_PROJECTION: "eh_proj",
    Role.MTP_EMBEDDING_NORM: "enorm",
    Role.MTP_STATE_NORM: "hnorm",
    Role.MTP_OUTPUT_NORM: "shared_head_norm",
    Role.MTP_EMBEDDING: "embed_tokens",
    Role.MTP_HEAD: "shared_head_head",
}
_DECODER_LAYER = "model.layers.{layer}."


def mtp_layer(spec: ModelSpec, prefix: str, names: Mapping[Role, str], norm: NormKind = NormKind.PLAIN) -> LayerSpec:
    """The description of a model's layer that predicts one more token: that of its last decoder layer that attends.

    Args:
        spec: the model.
        prefix: the beginning of the names of its tensors on the hub, in place of a decoder layer's.
        names: the names on the hub of the tensors that no decoder layer has.
        norm: how the scales of their norms are made from the tensors.
    """
    like = next(layer for layer in reversed(spec.layers) if layer.routed is not None and not layer.mixer.is_recurrent)
    renamed = (_renamed(tensor, prefix) for tensor in like.tensors)
    return replace(like, tensors=(*renamed, *(_further(spec, role, name, norm) for role, name in names.items())))


def _renamed(tensor: TensorSpec, prefix: str) -> TensorSpec:
    fused = tensor.fused
    if fused is not None:
        fused = replace(fused, name=fused.name.replace(_DECODER_LAYER, prefix))
    name = tensor.name.replace(_DECODER_LAYER, prefix)
    return replace(tensor, name=name, module=tensor.in_layer, fused=fused)


def _further(spec: ModelSpec, role: Role, name: str, norm: NormKind) -> TensorSpec:
    """A tensor that no decoder layer has."""
    gguf = f"blk.{{layer}}.nextn.{_GGUF[role]}.weight"
    if role in (Role.MTP_EMBEDDING, Role.MTP_HEAD):
        return TensorSpec(role, name, (str(spec.vocab_size), "D"), GgufTensor(gguf), Kind.TABLE)
    module = f"{MTP_MODULES[role]}.weight"
    if role is Role.MTP_PROJECTION:
        return TensorSpec(role, name, ("D", "2D"), GgufTensor(gguf), module=module)
    transform = SAME if norm is NormKind.PLAIN else PlusOne()
    return TensorSpec(role, name, ("D",), GgufTensor(gguf, transform), Kind.NORM, module=module, norm=norm)
