"""The types of all matrices in a recipe's files, known before they are written."""

from __future__ import annotations

from collections.abc import Mapping

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.files.block_scales import block_length
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.sources.weights import StoredType
from compressors.recover.scopes import BlockLength
from exporter.planning.plan import Plan
from exporter.planning.recipe import FileChoice, Recipe
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.onnx.encodings import preset_named, unit_encodings

__all__ = ["planned_block_length", "planned_types", "same_numbers"]

_Types = Mapping[tuple[Role, int | None], StoredType]


def planned_types(recipe: Recipe, artifact: str, spec: ModelSpec) -> _Types:
    """The type of each of a student's matrices in an artifact; norms and routers are not among them."""
    choice = recipe.file(artifact)
    if artifact == "gguf":
        return _gguf_types(choice, spec)
    encodings = unit_encodings(spec, preset_named(choice.mix), choice.tensors)
    return {
        key: encoding.ggml_type or encoding.blocks or GGMLQuantizationType.F32 for key, encoding in encodings.items()
    }


def planned_block_length(recipe: Recipe, artifact: str, spec: ModelSpec) -> BlockLength:
    """The block length of each matrix in the file that will be written."""
    types = planned_types(recipe, artifact, spec)

    def of_matrix(role: Role, layer: int) -> int | None:
        stored = types[role, layer]
        return block_length(stored) if isinstance(stored, GGMLQuantizationType) else stored.block_size

    return of_matrix


def same_numbers(plan: Plan) -> bool:
    """True if both files hold the same numbers, so that the runtimes can be compared with each other.

    All matrices have the same types, and these are all F32, or ggml's kernels make all codes with the same importance
    matrix.
    """
    recipe, spec = plan.recipe, plan.student_spec
    if len(recipe.artifacts) < 2:
        return False
    gguf, onnx = (recipe.file(artifact) for artifact in ("gguf", "onnx"))
    types = planned_types(recipe, "gguf", spec)
    if dict(types) != dict(planned_types(recipe, "onnx", spec)):
        return False
    is_float = set(types.values()) == {GGMLQuantizationType.F32}
    return is_float or (gguf.quantizer == onnx.quantizer == "kernel" and gguf.imatrix == onnx.imatrix)


def _gguf_types(choice: FileChoice, spec: ModelSpec) -> _Types:
    tensors = plan_tensors(spec, choice.mix, choice.tensors)
    return {
        (tensor.role, tensor.layer): tensor.ggml_type
        for tensor in tensors
        if len(tensor.shape) > 1 and tensor.role is not Role.ROUTER
    }
