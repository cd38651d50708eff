"""Measures the GGUF file in llama.cpp."""

from __future__ import annotations

from exporter.plan import Plan
from exporter.stage import StageContext
from exporter.stages.runtime import validate_runtime
from validate.llama_cpp import LlamaCppBackend

__all__ = ["run", "same_numbers"]


def run(context: StageContext) -> None:
    """See :func:`exporter.stages.runtime.validate_runtime`."""
    plan = context.plan
    (path,) = context.work.stage("gguf").glob("*.gguf")
    validate_runtime(
        context,
        "gguf",
        path,
        lambda: LlamaCppBackend(path, kv_type=plan.recipe.budget.kv_type, threads=plan.recipe.threads),
        references={},
        record=same_numbers(plan),
    )


def same_numbers(plan: Plan) -> bool:
    """Whether both files hold the same numbers, so that the runtimes can be compared with each other."""
    return plan.recipe.gguf is not None and plan.recipe.gguf == plan.recipe.onnx
