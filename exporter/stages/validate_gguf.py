"""Measures the GGUF file in llama.cpp."""

from __future__ import annotations

from exporter.stage import StageContext
from exporter.stages.artifacts import same_numbers
from exporter.stages.runtime import validate_runtime
from exporter.stages.validate_written import same_weights
from validate.llama_cpp import LlamaCppBackend

__all__ = ["run"]


def run(context: StageContext) -> None:
    """See :func:`exporter.stages.runtime.validate_runtime`."""
    plan = context.plan
    (path,) = context.work.stage("gguf").glob("*.gguf")
    validate_runtime(
        context,
        "gguf",
        path,
        lambda: LlamaCppBackend(path, kv_type=plan.recipe.budget.kv_type, threads=plan.recipe.threads),
        references=same_weights(context, "gguf"),
        record=same_numbers(plan),
    )
