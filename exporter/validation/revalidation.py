"""``moe-export validate``: checks whether files still work, ours or anybody's of the same model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from exporter.hub import bundled_text, resolve_model, resolve_original
from exporter.planning.job import parse_requirements
from exporter.planning.planner import HELDOUT_CHUNKS
from exporter.processes.child_process import start_server
from exporter.processes.team import checked_threads
from exporter.publishing.published import changed_files, read_report
from exporter.validation.guarded_validation import measured, refuse_unreadable
from exporter.validation.references import StoredReference, against_checkpoint, against_file, against_logits_file
from exporter.writing.files import complete_or_absent
from validate.files.model_file import ModelFile, RuntimeChoice, find_model_file, published_files
from validate.metrics.verdict import REQUIREMENTS, Check
from validate.report.facts import artifact_name, failures
from validate.runtimes.backend import RuntimeCrashError
from validate.runtimes.gpu import PROVIDERS

__all__ = ["revalidate"]


def revalidate(
    path: Path,
    *,
    against: str | None = None,
    text: Path | None = None,
    reference_logits: Path | None = None,
    save_reference_logits: Path | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    providers: str = "cpu",
    require: Iterable[str] = (),
) -> dict[str, Any]:
    """Measures files in their runtimes.

    Args:
        path: a folder that a run published, or any GGUF file, ``.onnx`` file or folder of an ONNX model.
        against: the original: a checkpoint's folder or hub id, or another file. None: the model that our report names.
        text: held-out text; None for the bundled one.
        reference_logits: a logits file of llama-perplexity that stands for the original and its text.
        save_reference_logits: the path for such a file of the original, for llama-perplexity and later runs.
        threads: threads of torch and the runtimes; None for all processors.
        gpu_layers: layers that llama.cpp puts on a GPU.
        providers: ``cpu`` or ``cuda``, for ONNX Runtime.
        require: thresholds ``NAME=VALUE``.

    Returns:
        The report of validation as plain data; docs/validation.md describes it.

    Raises:
        InputError: a file is damaged, has another vocabulary, or is not of the kind that its name says.
        MissingGpuError: the installed runtime has no GPU, and one is asked for.
    """
    if reference_logits is not None:
        _refuse_beside_logits(against, text, save_reference_logits)
    # an export's texts are not written again
    thresholds = parse_requirements(require, [name for name in REQUIREMENTS if name != "loops"])
    how = _runtimes(threads, gpu_layers, providers)
    report = read_report(path)
    files = _files(path, report)
    for file in files:
        file.check_can_run(how)
    start_server()
    for file in files:
        refuse_unreadable(file, how)
    checks = [] if report is None else [Check.at_most("files changed", changed_files(path, report), 0)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="moe-export-") as folder:
        if reference_logits is not None:
            reference = against_logits_file(reference_logits)
        else:
            logits_file = save_reference_logits or Path(folder) / "reference"
            try:
                with complete_or_absent(logits_file) as partial:
                    reference = _reference(report, against, text or bundled_text("heldout"), partial, Path(folder), how)
                reference = replace(reference, logits=logits_file)
            except RuntimeCrashError as death:
                return _without_reference(str(against), str(death), checks)
        for file in files:
            row, found = measured(file, reference, None if report is None else (path, report), how, thresholds)
            rows.append(row)
            checks += found
    return _result(reference, rows, checks)


def _refuse_beside_logits(*flags: object) -> None:
    """Refuses flags for the original and its text, which a logits file already contains."""
    if any(flags):
        raise InputError(
            "--reference-logits holds original and text: leave out --against, --text and --save-reference-logits"
        )


def _runtimes(threads: int | None, gpu_layers: int, providers: str) -> RuntimeChoice:
    if providers not in PROVIDERS:
        raise InputError(f"--providers: {providers!r} is not known; choose one of {', '.join(PROVIDERS)}")
    n_threads = checked_threads(threads)
    torch.set_num_threads(n_threads)
    return RuntimeChoice(n_threads, gpu_layers, providers)


def _result(reference: StoredReference, rows: list[dict[str, Any]], checks: list[Check]) -> dict[str, Any]:
    measured_rows = (row for row in rows if row["error"] is None)
    perplexity = next((row["perplexity_vs_teacher"]["base"] for row in measured_rows), None)
    about = {"reference": {"name": reference.name, "runtime": reference.runtime}, "perplexity_teacher": perplexity}
    deaths = [f"{artifact_name(row['artifact'])}: {row['error']}" for row in rows if row["error"] is not None]
    return _verdict(about, rows, checks, deaths)


def _without_reference(name: str, death: str, checks: list[Check]) -> dict[str, Any]:
    """The result if the ``--against`` file killed its runtime."""
    about = {"reference": {"name": name, "runtime": "unknown"}, "perplexity_teacher": None}
    return _verdict(about, [], [*checks, Check.at_least("reference.runs", 0, 1)], [f"--against: {name}: {death}"])


def _verdict(
    about: Mapping[str, Any], rows: list[dict[str, Any]], checks: list[Check], deaths: list[str]
) -> dict[str, Any]:
    """The whole report. The deaths of runtimes are listed first among the failures."""
    verdict = {"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}
    others = [asdict(check) for check in checks if not check.name.endswith(".runs")]
    return {
        "passed": verdict["passed"],
        **about,
        "rows": rows,
        "checks": verdict["checks"],
        "failures": deaths + failures({"verdict": {"checks": others}}),
    }


def _files(path: Path, report: Mapping[str, Any] | None) -> list[ModelFile]:
    if report is None:
        found = find_model_file(path)
        if found is None:
            raise InputError(
                f"{path} is {'no file or folder' if not path.exists() else 'no model'} that can be validated; give an "
                "output folder of moe-export, a GGUF file, or the folder of an ONNX model"
            )
        return [found]
    return published_files(path, report)


def _reference(
    report: Mapping[str, Any] | None,
    against: str | None,
    text: Path,
    logits_file: Path,
    folder: Path,
    how: RuntimeChoice,
) -> StoredReference:
    """Runs the original; its files, other than the logits, go into the folder."""
    file = None if against is None else _reference_file(Path(against))
    if file is not None:
        file.check_can_run(how)
        return against_file(file, text, _chunks_per_file(text), logits_file, folder, how)
    if report is None:
        if against is None:
            raise InputError(
                "--against is missing: give the original, as a checkpoint's folder, a hub id or another file"
            )
        source = open_source(resolve_model(against))
        return against_checkpoint(source, text, _chunks_per_file(text), logits_file, folder)
    source = open_source(resolve_original(against, report["job"]))
    if source.identity() != report["source"]["identity"]:
        raise InputError(f"--against: {source.path} is not the model that these files were made from")
    return against_checkpoint(source, text, report["recipe"]["text"]["heldout_chunks_per_file"], logits_file, folder)


def _reference_file(path: Path) -> ModelFile | None:
    """The file at a path; None for a checkpoint's folder, and for a hub id."""
    if path.is_dir() and any(path.glob("*.safetensors")):
        return None
    return find_model_file(path)


def _chunks_per_file(text: Path) -> int:
    """The number of chunks that an export would take of each file."""
    n_files = len(list(text.glob("*.txt"))) if text.is_dir() else 1
    return max(1, HELDOUT_CHUNKS // max(1, n_files))
