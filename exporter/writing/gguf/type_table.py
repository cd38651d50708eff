"""The costs of each type of each tensor of a GGUF file, in bytes and divergence, for an allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec, Place
from compressors.model.files.gguf.ggml_types import BLOCK_SIZES
from compressors.quantize import QUANTIZABLE_TYPES, GGMLQuantizationType
from compressors.sensitivity import Candidate, Quantizer, UnitPlan, feedback_factor, ggml_quantizer
from exporter.writing.gguf.container import aligned
from exporter.writing.gguf.layout import PlannedTensor, plan_tensors

__all__ = ["ALLOCATED_TYPES", "DecodeCost", "StoredTypes", "plan_gguf_units", "weights_of_a_token"]

DecodeCost = Callable[[str, int], float]
"""(a type's name, the number of weights that a token is multiplied with) -> seconds."""

StoredTypes = Callable[[Role, int | None], tuple[GGMLQuantizationType, ...]]
"""(a role, a layer) -> the types in which the source stores the parts of a tensor that is unchanged; empty: none."""

_T = GGMLQuantizationType

ALLOCATED_TYPES = (
    _T.Q8_0,
    _T.Q6_K,
    _T.Q5_K,
    _T.Q5_1,
    _T.Q5_0,
    _T.Q4_K,
    _T.Q4_1,
    _T.IQ4_NL,
    _T.Q4_0,
    _T.IQ4_XS,
    _T.Q3_K,
    _T.IQ3_S,
    _T.IQ3_XXS,
    _T.Q2_K,
    _T.IQ2_S,
    _T.IQ2_XS,
    _T.IQ2_XXS,
)
"""The types that an allocation chooses from unless it is told otherwise, from the most bits to the fewest."""


def plan_gguf_units(
    spec: ModelSpec,
    types: Sequence[GGMLQuantizationType] = ALLOCATED_TYPES,
    *,
    feedback: bool = False,
    quantizers: Mapping[GGMLQuantizationType, Quantizer | None] | None = None,
    decode_cost: DecodeCost | None = None,
    stored: StoredTypes = lambda _role, _layer: (),
) -> list[UnitPlan]:
    """A unit for each matrix of the model, in the file's order, with those types that fit the rows of all its parts.

    Matrices of the layer for MTP have no part in the divergence that an allocation weighs: they get the types of the
    last decoder layer of their kind, and are in its units. Its projection keeps the type that the file's mix gives it.

    Args:
        spec: the model in the file.
        types: types to choose from.
        feedback: True if error feedback reduces the errors (:func:`~compressors.sensitivity.feedback_factor`).
        quantizers: quantizers in place of ggml's kernels for some types; None: the type holds the weights exactly.
        decode_cost: decoding time in the runtime; None: time does not count.
        stored: the source's types; in its own type a tensor is exact, whatever its quantizer does.

    Raises:
        UnsupportedError: llama.cpp cannot represent the model.
    """
    matrices = [tensor for tensor in plan_tensors(spec, "F32") if tensor.is_matrix]
    of_mtp = [tensor for tensor in matrices if tensor.layer == spec.n_layers]
    plans = []
    for place, of_place in groupby(matrices[: len(matrices) - len(of_mtp)], key=lambda tensor: tensor.place):
        own_parts = list(of_place)
        parts = [*own_parts, *(tensor for tensor in of_mtp if _taken_from(tensor, spec) == place)]
        names = tuple(tensor.name for tensor in parts)
        n_used = sum(weights_of_a_token(spec, tensor) for tensor in own_parts)
        candidates, own = [], _own_type(stored(*place))
        for ggml_type in types if own is None or own in types else (*types, own):
            if all(tensor.row_length % BLOCK_SIZES[ggml_type][0] == 0 for tensor in parts):
                n_bytes = sum(aligned(tensor.n_bytes_in(ggml_type)) for tensor in parts)
                quantize, factor = _errors(ggml_type, feedback, quantizers or {})
                quantize = None if ggml_type is own else quantize
                seconds = 0.0 if decode_cost is None else decode_cost(ggml_type.name, n_used)
                candidates.append(Candidate(ggml_type.name, n_bytes, quantize, factor, seconds))
        plans.append(UnitPlan(names[0], names, (place,), tuple(candidates)))
    return plans


def _taken_from(tensor: PlannedTensor, spec: ModelSpec) -> Place | None:
    """The place of the matrix whose type a matrix of the layer for MTP gets; None: it has no such counterpart."""
    assert spec.mtp is not None
    if tensor.role in _LIKE_THE_MODELS:
        role = _LIKE_THE_MODELS[tensor.role]
        return (Role.TOKEN_EMBEDDING if spec.tied_embeddings else role), None
    alike = (index for index in reversed(range(spec.n_layers)) if tensor.role in spec.layers[index].roles)
    return next(((tensor.role, index) for index in alike), None)


_LIKE_THE_MODELS = {Role.MTP_EMBEDDING: Role.TOKEN_EMBEDDING, Role.MTP_HEAD: Role.HEAD}


def _own_type(stored: Sequence[GGMLQuantizationType]) -> GGMLQuantizationType | None:
    """The one type in which the source stores all parts of a tensor; None if there is none that can be written."""
    return stored[0] if len(set(stored)) == 1 and stored[0] in QUANTIZABLE_TYPES else None


def _errors(
    ggml_type: GGMLQuantizationType, feedback: bool, quantizers: Mapping[GGMLQuantizationType, Quantizer | None]
) -> tuple[Quantizer | None, Callable[[Role], float]]:
    """The quantizer of a type, None if it is exact, and the factor of its errors by role."""

    def factor(role: Role) -> float:
        return feedback_factor(role, ggml_type.name) if feedback else 1.0

    if ggml_type in quantizers:
        return quantizers[ggml_type], factor
    return ggml_quantizer(ggml_type), factor


def weights_of_a_token(spec: ModelSpec, tensor: PlannedTensor) -> int:
    """Counts the weights that one token is multiplied with: only its experts', and none of an untied embedding.

    Args:
        spec: the model.
        tensor: a tensor of its file.
    """
    if tensor.role is Role.TOKEN_EMBEDDING and not spec.tied_embeddings:
        return 0
    if tensor.n_experts and tensor.layer is not None:
        return tensor.n_values // tensor.n_experts * spec.layers[tensor.layer].top_k
    return tensor.n_values
