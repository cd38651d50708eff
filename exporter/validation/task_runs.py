"""``moe-export validate OUT --tasks``: the user's tasks, on each file in its runtime and on the original in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from compressors.calibration.splits import load_tokenizer
from compressors.model.errors import InputError
from compressors.model.files.json_file import read_json
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.file_names import REPORT
from exporter.hub import resolve_original
from exporter.processes.team import checked_threads
from exporter.validation.guarded import Limits, run_guarded
from validate.files.model_file import ModelFile, RuntimeChoice, published_files
from validate.report import facts, numbers
from validate.runtimes.backend import RuntimeCrashError
from validate.runtimes.time_limit import tell
from validate.runtimes.torch import TorchBackend
from validate.tasks.tasks import check_tasks, run_tasks

__all__ = ["task_failures", "task_results", "tasks_table"]

_LONGEST_TEXT = 2048
"""The most tokens of a task's text; longer ones lose their beginning, in every model alike."""
_RUNTIMES = {"gguf": "llama.cpp", "onnx": "onnxruntime"}


def task_results(
    out: Path, tasks: Path, *, against: str | None = None, threads: int | None = None, gpu_layers: int = 0
) -> list[dict[str, Any]]:
    """Runs tasks of lm-evaluation-harness.

    Args:
        out: a folder that a run published.
        tasks: a task's YAML file, or a folder of such files.
        against: the original model; None for the one that the report names.
        threads: threads of torch and the runtimes; None for all processors.
        gpu_layers: layers that llama.cpp puts on a GPU.

    Returns:
        For the original and each file: ``artifact``, ``runtime``, the harness's metrics by task, and ``error`` if the
        runtime died of a file, which then has no tasks.

    Raises:
        InputError: the extra is missing, a task cannot be loaded, or the folder is not one of ours.
    """
    check_tasks(tasks)
    try:
        report = read_json(out / REPORT)
    except InputError:
        raise InputError(f"{out} has no readable {REPORT}; give the output folder of a finished run") from None
    job = report["job"]
    source = open_source(resolve_original(against, job))
    if source.identity() != report["source"]["identity"]:
        raise InputError(f"--against: {source.path} is not the model that these files were made from")
    n_threads = checked_threads(threads)
    torch.set_num_threads(n_threads)
    length = min(_LONGEST_TEXT, source.spec.context_length)
    files = published_files(out, report)
    teacher = TorchBackend(Student.teacher(source))
    metrics = run_tasks(teacher, load_tokenizer(source.tokenizer_folder), tasks, max_length=length)
    original = {"artifact": "teacher", "runtime": "torch", "tasks": metrics, "error": None}
    how = RuntimeChoice(n_threads, gpu_layers)
    return [original, *(_of_file(file, source.tokenizer_folder, tasks, length, how) for file in files)]


def _of_file(file: ModelFile, tokenizer: Path, tasks: Path, length: int, how: RuntimeChoice) -> dict[str, Any]:
    """The file's results, measured in a guarded process."""
    limits = Limits.of_file(file, n_tokens=length, on_gpu=file.may_use_gpu(how))
    metrics, error = None, None
    try:
        metrics = run_guarded(file, limits, _run_file, file, tokenizer, tasks, length, how)
    except RuntimeCrashError as death:
        error = str(death)
    return {"artifact": file.format, "runtime": _RUNTIMES[file.format], "tasks": metrics, "error": error}


def _run_file(
    file: ModelFile, tokenizer: Path, tasks: Path, length: int, how: RuntimeChoice
) -> dict[str, dict[str, float]]:
    """Runs in the guarded process: runs the tasks."""
    torch.set_num_threads(how.threads)
    backend = file.open(how, length)
    tell("running tasks with it")
    return run_tasks(backend, load_tokenizer(tokenizer), tasks, max_length=length)


def tasks_table(results: list[dict[str, Any]]) -> Table:
    """The results for a terminal: models that ran in columns, metrics in rows, with standard errors after ±."""
    results = [result for result in results if result["error"] is None]
    table = Table("task", *(facts.row_name(result) for result in results), title="tasks")
    first, *_ = results
    for task, metrics in first["tasks"].items():
        for metric in metrics:
            if "_stderr" not in metric:
                table.add_row(f"{task}: {metric}", *(_cell(result["tasks"][task], metric) for result in results))
    return table


def task_failures(results: list[dict[str, Any]]) -> list[str]:
    """One line for each runtime that died."""
    return [
        f"{facts.artifact_name(result['artifact'])}, tasks: {result['error']}"
        for result in results
        if result["error"] is not None
    ]


def _cell(metrics: dict[str, float], metric: str) -> str:
    name, *of_filter = metric.split(" ")
    return numbers.fixed(metrics[metric], 4, error=metrics.get(" ".join([f"{name}_stderr", *of_filter])))
