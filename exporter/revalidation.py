"""``moe-export validate``: do these files still work? Ours, or anybody's of the same model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import InputError
from exporter.hub import bundled_text, resolve_model, resolve_original
from exporter.job import parse_requirements
from exporter.outputs import sha256_of
from exporter.planner import HELDOUT_CHUNKS
from exporter.references import Reference, against_checkpoint, against_file, against_logits_file
from exporter.team import checked_threads
from exporter.validated_file import Expectation, validate_file
from validate.gpu import PROVIDERS
from validate.model_file import ModelFile, RuntimeChoice, find_model_file
from validate.report.facts import failures
from validate.verdict import REQUIREMENTS, Check

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
        save_reference_logits: where to write such a file of the original, for llama-perplexity and later runs.
        threads: of torch and the runtimes; None for all processors.
        gpu_layers: layers that llama.cpp puts on a GPU.
        providers: ``cpu`` or ``cuda``: ONNX Runtime's.
        require: thresholds ``NAME=VALUE``.

    Returns:
        The report of validation as plain data; docs/validation.md describes it.

    Raises:
        InputError: a file is damaged, of another vocabulary, or not what it is said to be.
        MissingGpuError: the installed runtime has no GPU, and one is asked for.
    """
    # an export's texts are not written again
    thresholds = parse_requirements(require, [name for name in REQUIREMENTS if name != "loops"])
    how = _runtimes(threads, gpu_layers, providers)
    report = _read_report(path)
    files = _files(path, report)
    for file in files:
        file.check_can_run(how)
    checks = [] if report is None else [Check.at_most("files changed", _changed_files(path), 0)]
    rows = []
    with tempfile.TemporaryDirectory(prefix="moe-export-") as folder:
        if reference_logits is None:
            logits_file = save_reference_logits or Path(folder) / "reference"
            reference = _reference(report, against, text or bundled_text("heldout"), logits_file, how)
        elif against or text or save_reference_logits:
            raise InputError(
                "--reference-logits holds original and text: leave out --against, --text and --save-reference-logits"
            )
        else:
            reference = against_logits_file(reference_logits)
        for file in files:
            row, found = validate_file(file, reference, _expectation(path, report, file, reference), how, thresholds)
            rows.append(row)
            checks += found
    return _result(reference, rows, checks)


def _runtimes(threads: int | None, gpu_layers: int, providers: str) -> RuntimeChoice:
    if providers not in PROVIDERS:
        raise InputError(f"--providers: {providers!r} is not known; choose one of {', '.join(PROVIDERS)}")
    n_threads = checked_threads(threads)
    torch.set_num_threads(n_threads)
    return RuntimeChoice(n_threads, gpu_layers, providers)


def _expectation(path: Path, report: Mapping[str, Any] | None, file: ModelFile, reference: Reference) -> Expectation:
    if report is None:
        return Expectation.of_file(file, reference)
    return Expectation.of_report(path, report, reference)


def _result(reference: Reference, rows: list[dict[str, Any]], checks: list[Check]) -> dict[str, Any]:
    verdict = {"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}
    return {
        "passed": verdict["passed"],
        "reference": {"name": reference.name, "runtime": reference.runtime},
        "perplexity_teacher": rows[0]["perplexity_vs_teacher"]["base"],
        "rows": rows,
        "checks": verdict["checks"],
        "failures": failures({"verdict": verdict}),
    }


def _read_report(path: Path) -> dict[str, Any] | None:
    """The report of a folder that a run published; None for anything else."""
    try:
        report: dict[str, Any] = json.loads((path / "report.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        raise InputError(f"{path / 'report.json'} is damaged; give the output folder of a finished run") from None
    return report


def _files(path: Path, report: Mapping[str, Any] | None) -> list[ModelFile]:
    if report is None:
        found = find_model_file(path)
        if found is None:
            raise InputError(
                f"{path} is {'no file or folder' if not path.exists() else 'no model'} that can be validated; give an "
                "output folder of moe-export, a GGUF file, or the folder of an ONNX model"
            )
        return [found]
    files = []
    for artifact in report["artifacts"]:
        found = find_model_file(path / artifact["path"])
        if found is None:
            raise InputError(f"{path / artifact['path']}, which report.json names, is missing or damaged; export again")
        files.append(found)
    return files


def _reference(
    report: Mapping[str, Any] | None, against: str | None, text: Path, logits_file: Path, how: RuntimeChoice
) -> Reference:
    """Runs the original."""
    file = None if against is None else _reference_file(Path(against))
    if file is not None:
        file.check_can_run(how)
        return against_file(file, text, _chunks_per_file(text), logits_file, how)
    if report is None:
        if against is None:
            raise InputError(
                "--against is missing: give the original, as a checkpoint's folder, a hub id or another file"
            )
        return against_checkpoint(Checkpoint(resolve_model(against)), text, _chunks_per_file(text), logits_file)
    source = Checkpoint(resolve_original(against, report["job"]))
    if source.identity() != report["source"]["identity"]:
        raise InputError(f"--against: {source.folder} is not the model that these files were made from")
    return against_checkpoint(source, text, report["recipe"]["text"]["heldout_chunks_per_file"], logits_file)


def _reference_file(path: Path) -> ModelFile | None:
    """The file at a path; None for a checkpoint's folder, and for a hub id."""
    if path.is_dir() and any(path.glob("*.safetensors")):
        return None
    return find_model_file(path)


def _chunks_per_file(text: Path) -> int:
    """As an export would take."""
    n_files = len(list(text.glob("*.txt"))) if text.is_dir() else 1
    return max(1, HELDOUT_CHUNKS // max(1, n_files))


def _changed_files(out: Path) -> int:
    """How many files of SHA256SUMS are missing or have another hash."""
    try:
        lines = (out / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise InputError(f"{out} has no SHA256SUMS; give the output folder of a finished run") from None
    entries = [line.split("  ", 1) for line in lines]
    return sum(not (out / name).is_file() or sha256_of(out / name) != digest for digest, name in entries)
