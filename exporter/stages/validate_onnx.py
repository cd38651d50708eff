"""Measures the ONNX folder in ONNX Runtime."""

from __future__ import annotations

from compressors.model.predictions.log_probs import LogProbReader
from exporter.pipeline.stage import StageContext
from exporter.stages.onnx import FOLDER
from exporter.stages.runtime import LOG_PROBS, validate_runtime
from exporter.stages.validate_written import same_weights
from validate.runtimes.onnx import OnnxRuntimeBackend

__all__ = ["run"]


def run(context: StageContext) -> None:
    """See :func:`exporter.stages.runtime.validate_runtime`."""
    path = context.work.stage("onnx") / FOLDER
    recorded = context.work.stage("validate_gguf") / LOG_PROBS
    other_runtime = {"gguf": LogProbReader(recorded)} if recorded.exists() else {}
    validate_runtime(
        context,
        "onnx",
        path,
        lambda: OnnxRuntimeBackend(path, threads=context.plan.recipe.threads),
        references=same_weights(context, "onnx") | other_runtime,
        record=False,
    )
