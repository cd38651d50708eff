"""The choices that a file leaves: for each tensor the types that it may be stored in, with their exact bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from compressors.model.errors import UnsupportedError
from compressors.model.families import Role
from compressors.model.ggml_types import BLOCK_SIZES, GGMLQuantizationType
from compressors.model.integer_blocks import BlockType
from compressors.model.shape import MoeShape
from compressors.quantize.blocks import search_blocks
from compressors.sensitivity import Candidate, Quantizer, UnitPlan, feedback_factor, ggml_quantizer
from exporter.gguf.container import aligned
from exporter.gguf.layout import GgufTensor, plan_tensors
from exporter.gguf.mixes import MIXES
from exporter.onnx.encodings import ENCODINGS, PRESETS, Encoding, onnx_units
from exporter.planning.container import Container
from exporter.planning.decode_cost import seconds_of
from exporter.prediction import Prediction
from exporter.recipe import FileChoice

__all__ = ["LAST_RESORT", "fitting_mixes", "gguf_units", "units_of", "values_read"]

_T = GGMLQuantizationType

LAST_RESORT = frozenset({"Q2_0", "IQ1_S", "IQ1_M"})
"""Types that are taken where nothing else fits: Q2_0 has no fast kernel on x86 and needs a llama.cpp of 2026, and the
codes of the IQ1 types cannot be chosen again with error feedback."""

_SEARCHED = (
    *(_T.Q8_0, _T.Q6_K, _T.Q5_K, _T.Q5_1, _T.Q5_0, _T.Q4_K, _T.Q4_1, _T.Q4_0, _T.IQ4_NL, _T.IQ4_XS, _T.Q3_K),
    *(_T.IQ3_S, _T.IQ3_XXS, _T.Q2_K, _T.IQ2_S, _T.IQ2_XS, _T.IQ2_XXS, _T.Q2_0, _T.IQ1_M, _T.IQ1_S),
)
"""What the search may choose. MXFP4 and the ternary types are worse than others of their size for weights that were not
trained in them."""

_BASELINES = tuple(mix for mix in MIXES if not mix.startswith(("TQ", "MXFP", "Q2_0", "F")))
"""Mixes that people choose from; one in a float type larger than the source's holds the same numbers."""

_EXACT = {torch.bfloat16: _T.BF16, torch.float16: _T.F16, torch.float32: _T.F32}


def units_of(container: Container, dtype: torch.dtype) -> tuple[UnitPlan, ...]:
    """The choices that a file leaves."""
    if container.artifact == "gguf":
        return gguf_units(container.shape, dtype, container.choice)
    return onnx_unit_plans(container.shape, container.choice)


def fitting_mixes(container: Container) -> list[tuple[FileChoice, Prediction]]:
    """The named mixes that fit, the largest first, with the kernels' codes."""
    mixes = _BASELINES if container.artifact == "gguf" else PRESETS
    found = []
    for mix in mixes:
        choice = container.choice.model_copy(update={"mix": mix, "tensors": {}, "quantizer": "kernel"})
        try:
            prediction = container.prediction(choice)
        except UnsupportedError:
            continue
        if prediction.counted(container.budget.kind) <= container.budget.bytes:
            found.append((choice, prediction))
    return sorted(found, key=lambda entry: -entry[1].file)


def gguf_units(shape: MoeShape, dtype: torch.dtype, choice: FileChoice) -> tuple[UnitPlan, ...]:
    """Lists the tensors of a GGUF file that may be quantized, each with its types.

    Args:
        shape: of the student.
        dtype: of its weights; one type holds them exactly.
        choice: says how codes are chosen.
    """
    with_feedback = choice.quantizer == "feedback"
    return tuple(
        UnitPlan(
            tensor.name,
            (tensor.name,),
            ((tensor.role, tensor.layer),),
            tuple(
                _candidate(tensor, ggml_type, shape, with_feedback)
                for ggml_type in (_EXACT[dtype], *_SEARCHED)
                if tensor.row_length % BLOCK_SIZES[ggml_type][0] == 0
            ),
        )
        for tensor in plan_tensors(shape, "BF16")
        if tensor.ggml_type is _T.BF16
    )


def _candidate(tensor: GgufTensor, ggml_type: _T, shape: MoeShape, with_feedback: bool) -> Candidate:
    n_bytes = aligned(replace(tensor, ggml_type=ggml_type).n_bytes)
    seconds = seconds_of(ggml_type.name, values_read(tensor, shape))
    if ggml_type in _EXACT.values():
        return Candidate(ggml_type.name, n_bytes, None, seconds=seconds)
    factor: Callable[[Role], float] = partial(_factor, ggml_type.name) if with_feedback else _whole
    return Candidate(ggml_type.name, n_bytes, ggml_quantizer(ggml_type), factor, seconds)


def _factor(type_name: str, role: Role) -> float:
    return feedback_factor(role, type_name)


def _whole(_role: Role) -> float:
    return 1.0


def values_read(tensor: GgufTensor, shape: MoeShape) -> float:
    """Values that decoding one token multiplies with: of experts those of the chosen, of an embedding none."""
    if tensor.role is Role.TOKEN_EMBEDDING and not shape.tied_embeddings:
        return 0.0
    share = shape.top_k / shape.n_experts if tensor.role.is_expert and not shape.is_dense else 1.0
    return share * tensor.n_values


def onnx_unit_plans(shape: MoeShape, choice: FileChoice) -> tuple[UnitPlan, ...]:
    """Lists the units of an ONNX file, each with its encodings."""
    with_feedback = choice.quantizer == "feedback"
    return tuple(
        UnitPlan(
            unit.name,
            (unit.name,),
            tuple((role, unit.layer) for role in unit.weights),
            tuple(
                _encoding_candidate(ENCODINGS[name], n_bytes, with_feedback) for name, n_bytes in unit.encodings.items()
            ),
        )
        for unit in onnx_units(shape)
    )


def _encoding_candidate(encoding: Encoding, n_bytes: int, with_feedback: bool) -> Candidate:
    if encoding.blocks is None:
        return Candidate(encoding.name, n_bytes, None)
    factor: Callable[[Role], float] = partial(_factor, encoding.name) if with_feedback else _whole
    if encoding.ggml_type is not None:
        return Candidate(encoding.name, n_bytes, ggml_quantizer(encoding.ggml_type), factor)
    return Candidate(encoding.name, n_bytes, _blocks_quantizer(encoding.blocks), factor)


def _blocks_quantizer(blocks: BlockType) -> Quantizer:
    """The search for the scales of ONNX Runtime's blocks."""

    def quantize(values_RN: torch.Tensor, importance_N: torch.Tensor | None, name: str) -> torch.Tensor:
        found = search_blocks(values_RN, blocks.bits, blocks.block_size, importance_N, name=name)
        return torch.from_numpy(found.values())

    return quantize
