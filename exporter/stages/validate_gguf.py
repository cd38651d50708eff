"""Measures the GGUF file in llama.cpp."""

from __future__ import annotations

from exporter.pipeline.stage import StageContext
from exporter.stages.artifacts import same_numbers
from exporter.stages.runtime import validate_runtime
from exporter.stages.validate_written import same_weights
from validate.runtimes.llama_cpp import QUANTIZED_KV_TYPES, LlamaCppBackend, exact_kv_type

__all__ = ["run"]


def run(context: StageContext) -> None:
    """See :func:`exporter.stages.runtime.validate_runtime`."""
    plan = context.plan
    (path,) = context.work.stage("gguf").glob("*.gguf")
    kv_type = plan.recipe.budget.kv_type

    def load(kv_type: str) -> LlamaCppBackend:
        return LlamaCppBackend(path, kv_type=kv_type, threads=plan.recipe.threads)

    validate_runtime(
        context,
        "gguf",
        path,
        lambda: load(exact_kv_type(kv_type)),
        references=same_weights(context, "gguf"),
        record=same_numbers(plan),
        open_quantized=(lambda: load(kv_type)) if kv_type in QUANTIZED_KV_TYPES else None,
    )
