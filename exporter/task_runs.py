"""``moe-export validate OUT --tasks``: the user's tasks, on each file in its runtime and on the original in torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from compressors.calibration import load_tokenizer
from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import InputError
from compressors.model.student import Student
from exporter.hub import resolve_original
from exporter.team import checked_threads
from validate.backend import TextModel
from validate.llama_cpp import LlamaCppBackend
from validate.onnx_runtime import OnnxRuntimeBackend
from validate.report import facts, numbers
from validate.tasks import check_tasks, run_tasks
from validate.torch_reference import TorchBackend

__all__ = ["task_results", "tasks_table"]

_LONGEST_TEXT = 2048
"""Tokens that a task's text may have; longer ones lose their beginning, in every model alike."""


def task_results(
    out: Path, tasks: Path, *, against: str | None = None, threads: int | None = None, gpu_layers: int = 0
) -> list[dict[str, Any]]:
    """Runs tasks of lm-evaluation-harness.

    Args:
        out: a folder that a run published.
        tasks: a task's YAML file, or a folder of such files.
        against: the original model; None for the one that the report names.
        threads: of torch and the runtimes; None for all processors.
        gpu_layers: layers that llama.cpp puts on a GPU.

    Returns:
        For the original and each file: ``artifact``, ``runtime`` and by task the harness's metrics.

    Raises:
        InputError: the extra is missing, a task cannot be loaded, or the folder is not one of ours.
    """
    check_tasks(tasks)
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{out} has no readable report.json; give the output folder of a finished run") from None
    job = report["job"]
    source = Checkpoint(resolve_original(against, job))
    if source.identity() != report["source"]["identity"]:
        raise InputError(f"--against: {source.folder} is not the model that these files were made from")
    n_threads = checked_threads(threads)
    torch.set_num_threads(n_threads)
    length = min(_LONGEST_TEXT, source.shape.context_length)
    tokenizer = load_tokenizer(source.folder)
    return [
        {"artifact": artifact, "runtime": runtime, "tasks": run_tasks(model, tokenizer, tasks, max_length=length)}
        for artifact, runtime, model in _models(out, report, source, length, n_threads, gpu_layers)
    ]


def _models(
    out: Path, report: dict[str, Any], source: Checkpoint, length: int, threads: int, gpu_layers: int
) -> Iterator[tuple[str, str, TextModel]]:
    yield "teacher", "torch", TorchBackend(Student.teacher(source))
    for artifact in report["artifacts"]:
        path = out / artifact["path"]
        if artifact["format"] == "gguf":
            yield "gguf", "llama.cpp", LlamaCppBackend(path, n_ctx=length, threads=threads, gpu_layers=gpu_layers)
        else:
            yield "onnx", "onnxruntime", OnnxRuntimeBackend(path, threads=threads)


def tasks_table(results: list[dict[str, Any]]) -> Table:
    """The results for a terminal: models in columns, metrics in rows; standard errors behind ±."""
    table = Table("task", *(facts.row_name(result) for result in results), title="tasks")
    first, *_ = results
    for task, metrics in first["tasks"].items():
        for metric in metrics:
            if "_stderr" not in metric:
                table.add_row(f"{task}: {metric}", *(_cell(result["tasks"][task], metric) for result in results))
    return table


def _cell(metrics: dict[str, float], metric: str) -> str:
    name, *of_filter = metric.split(" ")
    return numbers.fixed(metrics[metric], 4, error=metrics.get(" ".join([f"{name}_stderr", *of_filter])))
