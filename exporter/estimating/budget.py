"""Predicts an artifact's file size to the byte, and the memory that it takes at run time, line by line."""

from __future__ import annotations

from functools import cache
from math import prod

from compressors.model.description.spec import ModelSpec
from compressors.model.sources.source import Origin
from exporter.estimating.prediction import Prediction
from exporter.planning.recipe import BudgetChoice, FileChoice
from exporter.writing.gguf.file_size import predict_file_size
from exporter.writing.gguf.layout import plan_tensors as gguf_tensors
from exporter.writing.gguf.memory import predict_runtime_bytes as gguf_runtime_bytes
from exporter.writing.onnx.file_size import predict_size
from exporter.writing.onnx.layout import plan_tensors as onnx_tensors
from exporter.writing.onnx.memory import predict_runtime_bytes as onnx_runtime_bytes
from validate.runtimes.measure import measure_base

__all__ = ["expert_bits", "predict", "runtime_reserve"]


def predict(
    artifact: str, source: Origin, name: str, spec: ModelSpec, choice: FileChoice, budget: BudgetChoice, threads: int
) -> Prediction:
    """Predicts an artifact (``gguf`` or ``onnx``) of a student.

    Args:
        artifact: its container.
        source: the original; its tokenizer is part of a GGUF file.
        name: the source's name, which a GGUF file carries.
        spec: the student.
        choice: the types of its weights.
        budget: context and KV type; the ONNX file keeps its KV cache in float32.
        threads: threads of the runtime.
    """
    if artifact == "gguf":
        file = predict_file_size(spec, source, choice.mix, name, choice.tensors)
        lines = gguf_runtime_bytes(spec, file, budget.context, budget.kv_type)
    else:
        file = predict_size(spec, choice.mix, encodings=choice.tensors)
        lines = onnx_runtime_bytes(
            spec, choice.mix, budget.context, threads=threads, encodings=choice.tensors, inputs=choice.inputs
        )
    return Prediction(file, lines["weights"], lines["kv_cache"], lines["compute"], runtime_reserve(artifact))


def expert_bits(artifact: str, spec: ModelSpec, choice: FileChoice) -> float:
    """Bits of an expert's weight in an artifact, scales included, on average over all layers."""
    if artifact == "gguf":
        tensors = [tensor for tensor in gguf_tensors(spec, choice.mix, choice.tensors) if tensor.role.is_expert]
        n_bytes, n_values = sum(tensor.n_bytes for tensor in tensors), sum(prod(tensor.shape) for tensor in tensors)
    else:
        weights = [
            weight for weight in onnx_tensors(spec, choice.mix, choice.tensors).weights if weight.roles[0].is_expert
        ]
        n_bytes = sum(tensor.n_bytes for weight in weights for tensor in weight.tensors)
        n_values = sum(prod(weight.shape) for weight in weights)
    return 8 * n_bytes / n_values


_RESERVE_STEP = 8 * 2**20  # rounded up, so that a plan does not depend on the last megabyte of a process


@cache
def runtime_reserve(artifact: str) -> int:
    """Resident bytes of a process that has loaded the runtime but no model, measured on this machine.

    Raises:
        MoeExportError: the runtime does not start.
    """
    base = measure_base(artifact)
    return -(-base // _RESERVE_STEP) * _RESERVE_STEP
