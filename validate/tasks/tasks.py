"""Runs the user's tasks, in the format of lm-evaluation-harness, on our backends."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from compressors.model.errors import InputError
from validate.runtimes.backend import TextModel

__all__ = ["check_tasks", "run_tasks"]


def check_tasks(path: Path) -> list[Path]:
    """The task files that a path names: one YAML file, or those of a folder.

    Raises:
        InputError: the extra is not installed, or there is no task file.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--tasks needs lm-evaluation-harness, which is not installed: pip install 'moe-export[tasks]'")
    files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise InputError(
            f"--tasks: {path} is no task of lm-evaluation-harness; give a YAML file, or a folder that holds some"
        )
    return files


def run_tasks(model: TextModel, tokenizer: Any, path: Path, *, max_length: int) -> dict[str, dict[str, float]]:
    """Runs every task of a file or folder.

    A task file may name Python code (``!function``), which runs with the user's rights. Data sets on a hub are not
    downloaded: a task reads local files (``dataset_path: json``), with paths from the folder that the command was
    started in.

    Args:
        model: the model that answers.
        tokenizer: its tokenizer, of transformers.
        path: a task's YAML file, or a folder of such files.
        max_length: tokens of the model's context.

    Returns:
        The harness's metrics by task, such as ``acc`` and ``acc_stderr``.

    Raises:
        InputError: the extra is not installed, a task cannot be loaded, or it asks for an unsupported feature.
    """
    files = check_tasks(path)
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        os.environ.setdefault(name, "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from validate.tasks.lm_eval_adapter import HarnessModel

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _data_sets_elsewhere():
        manager = TaskManager(include_defaults=False)
        tasks = [task for file in files for task in _loaded(manager, file)]
        result = simple_evaluate(
            HarnessModel(model, tokenizer, max_length), tasks=tasks, task_manager=manager, log_samples=False
        )
    return {name: _metrics(metrics) for name, metrics in result["results"].items()}


@contextmanager
def _data_sets_elsewhere() -> Iterator[None]:
    """Lets data sets be converted in a temporary folder, so that nothing stays in the user's cache."""
    config: Any = importlib.import_module("datasets.config")
    before = config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(prefix="moe-export-") as folder:
        config.HF_DATASETS_CACHE = Path(folder)
        try:
            yield
        finally:
            config.HF_DATASETS_CACHE = before


def _loaded(manager: Any, file: Path) -> list[Any]:
    """Loads the tasks of one file; every error of the harness or a data set becomes one sentence."""
    try:
        return list(manager.load([str(file)])["tasks"].values())
    except (KeyError, ValueError, TypeError, AttributeError, OSError, ImportError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"--tasks: {file} cannot be loaded by lm-evaluation-harness: {reason}") from None


def _metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Renames metrics: ``acc,none`` -> ``acc``; a metric's filter is named only if it has one."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    return {name.removesuffix(",none").replace(",", " "): value for name, value in numbers.items()}
