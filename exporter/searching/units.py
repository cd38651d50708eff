"""The choices that a file leaves: for each tensor the types that it may be stored in, with their exact bytes."""

from __future__ import annotations

from dataclasses import replace

from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.errors import UnsupportedError
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.storage_type import StorageType
from compressors.sensitivity import Candidate, Quantizer, UnitPlan, feedback_factor, ggml_quantizer
from compressors.sensitivity.quantizers import blocks_quantizer, searched_q2_0_quantizer
from exporter.estimating.prediction import Prediction
from exporter.planning.recipe import BudgetKind, FileChoice
from exporter.searching.decode_cost import seconds_of
from exporter.searching.untyped_file import UntypedFile
from exporter.writing.gguf.mixes import MIXES
from exporter.writing.gguf.type_table import ALLOCATED_TYPES, StoredTypes, plan_gguf_units
from exporter.writing.onnx.encodings import ENCODINGS, PRESETS, Encoding, Unit, onnx_units
from exporter.writing.onnx.memory import unit_runtime_bytes

__all__ = ["LAST_RESORT", "fitting_mixes", "gguf_units", "units_of"]

LAST_RESORT = frozenset({"Q2_0", "IQ1_S", "IQ1_M"})
"""Types that are only taken if nothing else fits: Q2_0 has no fast kernel on x86 and needs a llama.cpp of 2026, and the
codes of the IQ1 types cannot be chosen again with error feedback."""

_BASELINES = tuple(mix for mix in MIXES if not mix.startswith(("TQ", "MXFP", "Q2_0", "F")))
"""Mixes that people choose from; one in a float type larger than the source's holds the same numbers."""

_INT8_INPUTS = 1.0
"""The error of the 8-bit inputs of ONNX Runtime's 8-bit products, relative to that of the weights."""

_EXACT = {
    StorageType.BF16: GGMLQuantizationType.BF16,
    StorageType.F16: GGMLQuantizationType.F16,
    StorageType.F32: GGMLQuantizationType.F32,
}


def units_of(untyped: UntypedFile, weights: StorageType, stored: StoredTypes | None = None) -> tuple[UnitPlan, ...]:
    """Lists the choices that a file leaves.

    Args:
        untyped: the file.
        weights: the format of the source's weights.
        stored: the source's types of unchanged tensors; None: those of the source's layers, as if all were unchanged
            whose shape is.
    """
    if untyped.artifact == "gguf":
        return gguf_units(untyped.spec, weights, untyped.choice, _expected_types(untyped) if stored is None else stored)
    return onnx_unit_plans(untyped.spec, untyped.choice, untyped.budget.kind)


def fitting_mixes(untyped: UntypedFile) -> list[tuple[FileChoice, Prediction]]:
    """The named mixes that fit, the largest first, with the kernels' codes."""
    mixes = _BASELINES if untyped.artifact == "gguf" else PRESETS
    found = []
    for mix in mixes:
        choice = untyped.choice.model_copy(update={"mix": mix, "tensors": {}, "quantizer": "kernel"})
        try:
            prediction = untyped.prediction(choice)
        except UnsupportedError:
            continue
        if prediction.counted(untyped.budget.kind) <= untyped.budget.bytes:
            found.append((choice, prediction))
    return sorted(found, key=lambda entry: -entry[1].file)


def _expected_types(untyped: UntypedFile) -> StoredTypes:
    """The types of tensors that have their shape in a structure that is not built yet."""
    source, spec = untyped.source, untyped.spec

    def stored(role: Role, layer: int | None) -> tuple[GGMLQuantizationType, ...]:
        if layer is not None and not _are_alike(spec.layers[layer], source.spec.layers[layer]):
            return ()
        return source.stored_types(role, layer)

    if spec.n_layers != source.spec.n_layers:
        return lambda _role, _layer: ()

    return stored


def _are_alike(one: LayerSpec, other: LayerSpec) -> bool:
    """True if two layers differ in nothing but the number of their experts, as far as sizes tell."""
    return {**one.sizes, "E": 0} == {**other.sizes, "E": 0}


def gguf_units(
    spec: ModelSpec,
    weights: StorageType,
    choice: FileChoice,
    stored: StoredTypes = lambda _role, _layer: (),
) -> tuple[UnitPlan, ...]:
    """Lists the tensors of a GGUF file that may be quantized, each with its types.

    Args:
        spec: the student.
        weights: the format of its weights; one type holds them exactly.
        choice: says how codes are chosen.
        stored: the types in which the source holds tensors that are unchanged; these are exact, too.
    """
    exact = _EXACT[weights]
    last = (GGMLQuantizationType[name] for name in sorted(LAST_RESORT))
    quantizers: dict[GGMLQuantizationType, Quantizer | None] = {exact: None}
    if choice.quantizer == "feedback":
        quantizers[GGMLQuantizationType.Q2_0] = searched_q2_0_quantizer
    plans = plan_gguf_units(
        spec,
        (exact, *ALLOCATED_TYPES, *last),
        feedback=choice.quantizer == "feedback",
        quantizers=quantizers,
        decode_cost=seconds_of,
        stored=stored,
    )
    return tuple(plans)


def onnx_unit_plans(spec: ModelSpec, choice: FileChoice, budget_kind: BudgetKind = "file") -> tuple[UnitPlan, ...]:
    """Lists the units of an ONNX file, each with its encodings.

    Args:
        spec: the student.
        choice: says how codes are chosen, and the inputs of products.
        budget_kind: a budget of the ``total`` counts what the runtime keeps beside the file's bytes, which depends on
            the encoding; so do the candidates then. Of a GGUF file both budgets count the same bytes of a tensor.
    """
    with_feedback = choice.quantizer == "feedback"
    stored = {name: replace(encoding, inputs=choice.inputs) for name, encoding in ENCODINGS.items()}

    def candidate(unit: Unit, name: str, n_bytes: int) -> Candidate:
        if budget_kind == "total":
            n_bytes = unit_runtime_bytes(spec, unit, stored[name])
        return _encoding_candidate(ENCODINGS[name], n_bytes, with_feedback)

    return tuple(
        UnitPlan(
            unit.name,
            (unit.name,),
            tuple((role, unit.layer) for role in unit.weights),
            tuple(candidate(unit, name, n_bytes) for name, n_bytes in unit.encodings.items()),
        )
        for unit in onnx_units(spec)
    )


def _encoding_candidate(encoding: Encoding, n_bytes: int, with_feedback: bool) -> Candidate:
    if encoding.blocks is None:
        return Candidate(encoding.name, n_bytes, None)

    def factor(role: Role) -> float:
        of_weights = feedback_factor(role, encoding.name) if with_feedback else 1.0
        return of_weights + (_INT8_INPUTS if encoding.bits == 8 else 0.0)

    if encoding.ggml_type is not None:
        return Candidate(encoding.name, n_bytes, ggml_quantizer(encoding.ggml_type), factor)
    return Candidate(encoding.name, n_bytes, blocks_quantizer(encoding.blocks), factor)
