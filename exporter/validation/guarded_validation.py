"""Measures one file of ``moe-export validate`` in a guarded process."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compressors.model.errors import InputError, MoeExportError
from exporter.validation.guarded import Limits, run_guarded
from exporter.validation.references import Reference, StoredReference
from exporter.validation.validated_file import Expectation, describe_file, validate_file
from validate.files.model_file import ModelFile, RuntimeChoice
from validate.metrics.verdict import Check
from validate.runtimes.backend import RuntimeCrashError

__all__ = ["measured", "refuse_unreadable"]

_Published = tuple[Path, Mapping[str, Any]]
"""The folder that a run published, and the report in it."""


def refuse_unreadable(file: ModelFile, how: RuntimeChoice) -> None:
    """Reads a file's header in a guarded process: a damaged file is refused before the original is run.

    Raises:
        InputError: the header cannot be read. (If reading it kills the process, :func:`measured` reports that.)
    """
    with suppress(RuntimeCrashError):
        run_guarded(file, Limits.of_file(file, on_gpu=file.may_use_gpu(how)), _read_header, file)


def _read_header(file: ModelFile) -> None:
    assert file.facts is not None


def measured(
    file: ModelFile,
    reference: StoredReference,
    published: _Published | None,
    how: RuntimeChoice,
    require: Mapping[str, float],
    limits: Limits | None = None,
) -> tuple[dict[str, Any], list[Check]]:
    """Measures a file against a reference.

    Args:
        file: the file to measure.
        reference: the reference to measure it against.
        published: the folder and report that it comes from, if one of our runs wrote it.
        how: the settings of its runtime.
        require: thresholds by name.
        limits: the limits of the process; None: those for a file of its size.

    Returns:
        Its row of the report, and its checks. If the runtime dies of the file, ``error`` of the row says how, the check
        ``runs`` has failed, and only settings and tokenizer are checked besides.

    Raises:
        InputError: the file cannot be read, or its vocabulary is another.
        MissingGpuError: the installed runtime has no GPU, and one is asked for.
    """
    limits = limits or Limits.of_file(
        file,
        n_tokens=reference.n_tokens,
        reference_seconds=reference.seconds_per_chunk,
        on_gpu=file.may_use_gpu(how),
    )
    try:
        row, checks = run_guarded(file, limits, _validate, file, reference, published, how, dict(require))
    except RuntimeCrashError as death:
        checks, symptoms = _seen(file, reference, published, limits)
        row = {"artifact": file.format, "path": str(file.path), "error": str(death), "symptoms": symptoms}
        return row, [Check.at_least(f"{file.format}.runs", 0, 1), *checks]
    except InputError as refusal:
        _, symptoms = _seen(file, reference, published, limits)
        if symptoms:
            raise InputError(f"{refusal}; what is wrong in the file: {symptoms[0]}") from None
        raise
    return row, [Check(**check) for check in checks]


def _seen(
    file: ModelFile, reference: StoredReference, published: _Published | None, limits: Limits
) -> tuple[list[Check], list[str]]:
    """Compares settings and tokenizer of a file that cannot run, because they may show why."""
    try:
        found = run_guarded(file, limits, _describe, file, reference, published)
    except MoeExportError:
        return [], []
    return [Check(**check) for check in found["checks"]], found["symptoms"]


def _describe(file: ModelFile, stored: StoredReference, published: _Published | None) -> dict[str, Any]:
    """Runs in the guarded process, for :func:`_seen`."""
    reference = stored.open(file)
    findings = describe_file(file, reference, _expectation(file, reference, published))
    if findings is None:
        return {"checks": [], "symptoms": []}
    return {"checks": [asdict(check) for check in findings.checks], "symptoms": findings.symptoms}


def _expectation(file: ModelFile, reference: Reference, published: _Published | None) -> Expectation:
    if published is None:
        return Expectation.of_file(file, reference)
    return Expectation.of_report(*published, reference)


def _validate(
    file: ModelFile,
    stored: StoredReference,
    published: _Published | None,
    how: RuntimeChoice,
    require: Mapping[str, float],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs in the guarded process: validates the file."""
    torch.set_num_threads(how.threads)
    reference = stored.open(file)
    row, checks = validate_file(file, reference, _expectation(file, reference, published), how, require)
    return row, [asdict(check) for check in checks]
