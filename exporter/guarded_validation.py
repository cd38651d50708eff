"""One file of ``moe-export validate``, measured in a guarded process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from exporter.guarded import Limits, run_guarded
from exporter.references import StoredReference
from exporter.validated_file import Expectation, validate_file
from validate.backend import RuntimeCrashError
from validate.model_file import ModelFile, RuntimeChoice
from validate.verdict import Check

__all__ = ["measured"]

_Published = tuple[Path, Mapping[str, Any]]
"""A folder of ours, and the report in it."""


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
        file: what is measured.
        reference: what it is measured against.
        published: where it is from, if a run of ours wrote it.
        how: how it is run.
        require: thresholds by name.
        limits: of the process; None: what a file of its size needs.

    Returns:
        Its row of the report, and its checks. Of a file that its runtime dies of, the row says how, in ``error``, and
        the only check has failed.

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
        row = {"artifact": file.format, "path": str(file.path), "error": str(death)}
        return row, [Check.at_least(f"{file.format}.runs", 0, 1)]
    return row, [Check(**check) for check in checks]


def _validate(
    file: ModelFile,
    stored: StoredReference,
    published: _Published | None,
    how: RuntimeChoice,
    require: Mapping[str, float],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the guarded process does."""
    torch.set_num_threads(how.threads)
    reference = stored.open()
    if published is None:
        expectation = Expectation.of_file(file, reference)
    else:
        expectation = Expectation.of_report(*published, reference)
    row, checks = validate_file(file, reference, expectation, how, require)
    return row, [asdict(check) for check in checks]
