"""What an artifact needs, before it exists: its file to the byte, and the memory it takes at run time, line by line."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from compressors.model.shape import MoeShape
from exporter.gguf.memory import predict_runtime_bytes as gguf_runtime_bytes
from exporter.gguf.writer import predict_file_size
from exporter.onnx.memory import predict_runtime_bytes as onnx_runtime_bytes
from exporter.onnx.writer import predict_size
from exporter.prediction import Prediction
from exporter.recipe import BudgetChoice
from validate.measure import measure_base

__all__ = ["predict", "runtime_reserve"]


def predict(
    artifact: str, folder: Path, name: str, shape: MoeShape, weight_type: str, budget: BudgetChoice, threads: int
) -> Prediction:
    """Predicts an artifact (``gguf`` or ``onnx``) of a student of this shape.

    Args:
        artifact: which container.
        folder: the source checkpoint; its tokenizer is part of a GGUF file.
        name: the source's name, which a GGUF file carries.
        shape: the student's shape.
        weight_type: a preset of the container.
        budget: context and KV type; the ONNX file keeps its KV cache in float32.
        threads: of the runtime.
    """
    if artifact == "gguf":
        file = predict_file_size(shape, folder, weight_type, name)
        lines = gguf_runtime_bytes(shape, file, budget.context, budget.kv_type)
    else:
        file = predict_size(shape, weight_type)
        lines = onnx_runtime_bytes(shape, weight_type, budget.context, threads=threads)
    return Prediction(file, lines["weights"], lines["kv_cache"], lines["compute"], runtime_reserve(artifact))


_RESERVE_STEP = 8 * 2**20  # rounded up, so that a plan does not depend on the last megabyte of a process


@cache
def runtime_reserve(artifact: str) -> int:
    """Resident bytes of a process that has loaded the runtime but no model, measured on this machine.

    Raises:
        MoeExportError: the runtime does not start.
    """
    base = measure_base(artifact)
    return -(-base // _RESERVE_STEP) * _RESERVE_STEP
