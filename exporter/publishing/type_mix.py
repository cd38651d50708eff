"""The types of a GGUF file by kind of tensor: what people compare files by."""

from __future__ import annotations

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from exporter.planning.recipe import FileChoice
from exporter.writing.gguf.layout import PlannedTensor, plan_tensors

__all__ = ["type_mix"]

_KINDS = {
    Role.EXPERT_GATE: "gate of the experts",
    Role.EXPERT_UP: "up of the experts",
    Role.EXPERT_DOWN: "down of the experts",
    Role.TOKEN_EMBEDDING: "embedding",
    Role.HEAD: "head",
}
_MIXERS, _SHARED = "attention and other mixers", "shared and dense feed-forwards"


def type_mix(choice: FileChoice, spec: ModelSpec) -> dict[str, dict[str, int]]:
    """For each kind of matrix that may be quantized, the number of tensors of each type, the most frequent first."""
    counts: dict[str, dict[str, int]] = {}
    for tensor in plan_tensors(spec, choice.mix, choice.tensors):
        if tensor.is_matrix:
            of_kind = counts.setdefault(_kind(tensor), {})
            of_kind[tensor.ggml_type.name] = of_kind.get(tensor.ggml_type.name, 0) + 1
    return {kind: dict(sorted(types.items(), key=lambda item: (-item[1], item[0]))) for kind, types in counts.items()}


def _kind(tensor: PlannedTensor) -> str:
    return _KINDS.get(tensor.role, _SHARED if tensor.role.is_feed_forward else _MIXERS)
