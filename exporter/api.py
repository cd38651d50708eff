"""The tool as functions of Python: each does what the command of its name does, and returns plain data.

    from exporter import Flags, export, fits, inspect, validate

    if __name__ == "__main__":  # stages run in processes of their own, which import the script
        result = export(Flags(model="Qwen/Qwen3-30B-A3B", budget="20GB"), announce=print)
        print(result.out, result.report["verdict"]["passed"])

A function imports what it needs when it is called, so importing the package costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.planning.flags import Flags

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from exporter.run import Result

__all__ = ["Flags", "export", "fits", "inspect", "load_student", "validate"]


def _nobody(_text: str) -> None:
    """Hears a text and does nothing."""


def export(flags: Flags, *, announce: Callable[[str], None] = _nobody) -> Result:
    """Compresses a model to its budget, writes and measures the files: the command ``moe-export``.

    A call with the same flags goes on where an earlier one stopped, and returns at once if that had finished.

    Args:
        flags: the model, the budget, and every other choice.
        announce: called with a text for each stage.

    Returns:
        The output folder, and the data of its ``report.json``.

    Raises:
        MoeExportError: a value or a file is wrong, or nothing fits; its kinds stand in
            :mod:`compressors.model.errors`.
    """
    from exporter.planning.flags import command_of
    from exporter.run import run_job

    return run_job(flags.job(), command_of(flags), announce)


def inspect(model: str | Path, *, revision: str | None = None, offline: bool = False) -> dict[str, Any]:
    """Describes layout, routing rule and sizes of a model from its headers: ``moe-export inspect``.

    Args:
        model: a folder, a GGUF file, or a hub id, of which only headers and small files are downloaded.
        revision: of a hub model; None: its newest.
        offline: True takes hub models from the cache only.

    Raises:
        InputError: there is no such model, or it cannot be read.
    """
    from exporter.hub_headers import folder_with_headers
    from exporter.inspection import describe

    with folder_with_headers(str(model), revision, offline=offline) as folder:
        return describe(folder) | {"folder": str(model)}


def fits(
    model: str | Path,
    *,
    machines: Iterable[str] = (),
    budgets: Iterable[str] = (),
    vram: str | None = None,
    ram: str | None = None,
    context: int = Flags.context,
    kv_type: str = Flags.kv_type,
    revision: str | None = None,
    offline: bool = False,
) -> list[dict[str, Any]]:
    """Says what a model would give on each machine, from its headers: ``moe-export fits --json``.

    Args:
        model: a folder, a GGUF file, or a hub id, of which only headers and small files are downloaded.
        machines: names such as ``16gb-mac``; without machines, budgets and memories, all that are known.
        budgets: other sizes of memory, such as ``20GB``.
        vram: the size of a graphics card's memory.
        ram: the computer's memory that a model may take.
        context: tokens of cache to count, at most the model's.
        kv_type: the type of llama.cpp's cache.
        revision: of a hub model; None: its newest.
        offline: True takes hub models from the cache only.

    Returns:
        For each machine its file's size in bytes, bits per weight, types, expected divergence in nats, and speed.

    Raises:
        InputError: a value is wrong, or the model cannot be read.
        UnsupportedError: no GGUF file can hold the model.
    """
    from exporter.machines.command import machines_of, run_fits
    from exporter.machines.table import fits_data

    chosen = machines_of(",".join(machines), ",".join(budgets), vram, ram)
    return fits_data(run_fits(str(model), revision, offline=offline, machines=chosen, context=context, kv_type=kv_type))


def load_student(path: str | Path) -> PreTrainedModel:
    """Loads a student that a run saved (``--save-student``), as a module of transformers.

    Stock transformers loads most such folders too. Experts that stand on shared bases (docs/lightmoe.md) only this
    function puts together: the module's experts are whole, and nothing in the folder is run.

    Args:
        path: the folder ``student`` of a run, or any folder of a checkpoint.

    Raises:
        InputError: a file is missing or damaged.
    """
    from exporter.saved_student import load

    return load(Path(path))


def validate(path: str | Path, **how: Any) -> dict[str, Any]:
    """Measures files in their runtimes: ``moe-export validate --json``.

    Args:
        path: a folder that a run published, or any GGUF file, ``.onnx`` file or folder of an ONNX model.
        how: the arguments of :func:`~exporter.validation.revalidation.revalidate`, such as ``against``.

    Returns:
        The report of validation; docs/validation.md describes it.

    Raises:
        MoeExportError: a file is damaged, or not of the kind that its name says.
    """
    from exporter.validation.revalidation import revalidate

    return revalidate(Path(path), **how)
