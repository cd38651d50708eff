"""Measures the GGUF file in llama.cpp and the ONNX folder in ONNX Runtime.

Each is measured for its cost in a separate process, then for its fidelity, then for a few generated texts. Neither
runtime is imported before it is needed: the server that forks the stages must not have them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from exporter.estimating.planned_types import same_numbers
from exporter.file_names import EVALUATION, HELDOUT_PREDICTIONS, LOG_PROBS, MEASUREMENT
from exporter.stages.inputs import artifact_path, teacher_predictions, text_figures, token_blocks
from exporter.stages.judge.reference import router_inputs, same_weights
from exporter.work.stage import StageContext
from validate.metrics.evaluation import evaluate
from validate.metrics.figures import fidelity_figures
from validate.metrics.generation import generate_texts, prompts_of
from validate.metrics.positions import ReferenceLogProbs
from validate.routing.router_alone import router_alone
from validate.runtimes.backend import RuntimeBackend, RuntimeCrashError, scored_positions
from validate.runtimes.mapped_pages import hold_to
from validate.runtimes.measure import artifact_bytes, measure_artifact
from validate.runtimes.time_limit import patience, set_limit

__all__ = ["limit_runtime", "validate_gguf", "validate_onnx"]


def validate_gguf(context: StageContext) -> None:
    """Measures the GGUF file in llama.cpp."""
    from validate.runtimes.llama_cpp import QUANTIZED_KV_TYPES, LlamaCppBackend, exact_kv_type

    plan, path = context.plan, artifact_path(context.work, "gguf")
    kv_type = plan.recipe.budget.kv_type

    def load(kv_type: str) -> LlamaCppBackend:
        return LlamaCppBackend(path, kv_type=kv_type, threads=plan.recipe.threads)

    _validate_runtime(
        context,
        "gguf",
        path,
        lambda: load(exact_kv_type(kv_type)),
        references=same_weights(context, "gguf"),
        record=same_numbers(plan),
        open_quantized=(lambda: load(kv_type)) if kv_type in QUANTIZED_KV_TYPES else None,
    )


def validate_onnx(context: StageContext) -> None:
    """Measures the ONNX folder in ONNX Runtime."""
    from validate.runtimes.onnx import OnnxRuntimeBackend

    path = artifact_path(context.work, "onnx")
    recorded = context.work.path("validate_gguf", LOG_PROBS)
    other_runtime: dict[str, ReferenceLogProbs] = {"gguf": LogProbReader(recorded)} if recorded.exists() else {}
    _validate_runtime(
        context,
        "onnx",
        path,
        lambda: OnnxRuntimeBackend(path, threads=context.plan.recipe.threads),
        references=same_weights(context, "onnx") | other_runtime,
        record=False,
    )


def _validate_runtime(
    context: StageContext,
    artifact: str,
    path: Path,
    open_backend: Callable[[], RuntimeBackend],
    *,
    references: Mapping[str, ReferenceLogProbs],
    record: bool,
    open_quantized: Callable[[], RuntimeBackend] | None = None,
) -> None:
    """Writes the artifact's evaluation and measurement.

    Args:
        context: the context of the stage.
        artifact: ``gguf`` or ``onnx``.
        path: the file or folder to measure.
        open_backend: loads it for evaluation; called after the cost was measured, because a crash there leaves this
            process alive.
        references: other models' log-probabilities beside the teacher's.
        record: keep the artifact's own log-probabilities, for the other runtime to be compared with.
        open_quantized: loads it with the quantized cache of the budget, if there is one; its loss is measured on top.
    """
    recipe = context.plan.recipe
    budget, heldout = recipe.budget, token_blocks(context.work).heldout.numpy()
    torch.set_num_threads(recipe.threads)
    limit_runtime(context, artifact, path, heldout.shape[1])
    measurement: dict[str, Any] = {"error": None}
    try:
        cost = measure_artifact(
            artifact,
            path,
            context=budget.context,
            kv_type=budget.kv_type,
            threads=recipe.threads,
            prompt=heldout[0],
            memory_bytes=context.plan.memory_bytes,
        )
        figures = _figures(context, artifact, open_backend(), heldout, references, record=record)
        cache = None if open_quantized is None else _with_quantized_cache(context, open_quantized(), heldout)
    except RuntimeCrashError as crash:
        measurement["error"] = str(crash)
    else:
        measurement |= {"cost": asdict(cost), "quantized_cache": cache, **figures}
    context.file(MEASUREMENT).write_text(json.dumps(measurement, indent=1), encoding="utf-8")


def limit_runtime(context: StageContext, artifact: str, path: Path, n_tokens: int) -> None:
    """Ends this process if a runtime takes too long with an artifact, a finding, and holds it to ``--memory``."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # a debugger would print for half a minute
    set_limit(patience(artifact_bytes(artifact, path), n_tokens))
    hold_to(context.plan.memory_bytes)


def _figures(
    context: StageContext,
    artifact: str,
    backend: RuntimeBackend,
    heldout_BT: npt.NDArray[np.int64],
    references: Mapping[str, ReferenceLogProbs],
    *,
    record: bool,
) -> dict[str, Any]:
    """Returns figures for the measurement, and writes the evaluation into a file."""
    _evaluate(context, backend, heldout_BT, references, record=record)
    prompts_PT = prompts_of(heldout_BT)
    with context.progress.bar("texts", 2 * len(prompts_PT) + 1) as advance:
        texts = generate_texts(backend, prompts_PT, advance)
    return {
        "runtime_version": backend.version,
        "generation": text_figures(context.plan, prompts_PT, texts),
        "router_alone": _router_alone(context, artifact, backend, heldout_BT),
    }


def _with_quantized_cache(
    context: StageContext, backend: RuntimeBackend, heldout_BT: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Measures fidelity to the teacher with the quantized cache."""
    teacher = teacher_predictions(context.plan, context.work, HELDOUT_PREDICTIONS)
    with context.progress.bar("chunks", len(heldout_BT)) as advance:
        evaluation = evaluate(backend, heldout_BT, {"teacher": teacher}, progress=advance)
    figures = fidelity_figures(evaluation, "teacher")
    return {
        "kv_type": context.plan.recipe.budget.kv_type,
        **{name: figures[name] for name in ("perplexity", "perplexity_interval", "kld", "top1_agreement")},
    }


def _router_alone(
    context: StageContext, artifact: str, backend: RuntimeBackend, heldout_BT: npt.NDArray[np.int64]
) -> dict[str, Any] | None:
    """Runs the runtime's routers on torch's router inputs; None for a student without routers."""
    inputs = router_inputs(context, artifact)
    if not inputs.folder.exists():
        return None
    return router_alone(inputs, backend.route(heldout_BT[inputs.chunks()], inputs)).figures()


def _evaluate(
    context: StageContext,
    backend: RuntimeBackend,
    heldout_BT: npt.NDArray[np.int64],
    references: Mapping[str, ReferenceLogProbs],
    *,
    record: bool,
) -> None:
    """Writes the evaluation and, if wanted, the backend's own log-probabilities."""
    writer = None
    if record:
        scored = scored_positions(heldout_BT.shape[1])
        n_scored = len(heldout_BT) * (scored.stop - scored.start)
        writer = LogProbWriter(context.file(LOG_PROBS), n_scored, context.plan.teacher_spec.vocab_size)
    teacher = teacher_predictions(context.plan, context.work, HELDOUT_PREDICTIONS)
    with context.progress.bar("chunks", len(heldout_BT)) as advance:
        evaluation = evaluate(backend, heldout_BT, {"teacher": teacher, **references}, record=writer, progress=advance)
    evaluation.save(context.file(EVALUATION))
