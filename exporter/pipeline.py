"""The stages in order: which depends on what, which are done already, and running the others one by one."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError, MoeExportError
from exporter.plan import Plan
from exporter.stage import OUTCOME
from exporter.work import StageRecord, WorkDirectory

__all__ = ["ALL_STAGES", "Stage", "StageError", "fingerprints", "run_stages", "stages_of"]


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline; its code is ``exporter.stages.NAME``.

    Raise ``version`` by hand whenever the stage's outputs change for the same inputs.
    """

    name: str
    version: int
    needs: tuple[str, ...]  # stages whose outputs it reads, if the plan has them
    choices: tuple[str, ...]  # parts of the recipe that its outputs depend on
    what: str  # for the person who waits
    resumes: bool = False  # it goes on with the files that a killed attempt left
    crash_is_a_finding: bool = False  # it runs somebody else's runtime, whose death is a result


_CALIBRATE = Stage(
    "calibrate", 1, (), ("source", "text", "threads"), "run the teacher over the calibration text", resumes=True
)
_COMPRESS = Stage("compress", 1, ("calibrate",), ("compress",), "choose the experts")
_SCHEDULE = Stage("schedule", 1, ("compress",), ("recover",), "time a step of Router KD")
_RECOVER = Stage("recover", 1, ("compress", "schedule"), ("recover",), "teach the routers", resumes=True)
_GGUF = Stage("gguf", 1, ("recover",), ("gguf",), "write the GGUF file", resumes=True)
_ONNX = Stage("onnx", 1, ("recover",), ("onnx", "budget"), "write the ONNX folder", resumes=True)
_STUDENT = Stage("student", 1, ("recover",), (), "write the student checkpoint", resumes=True)
_VALIDATE_TORCH = Stage("validate_torch", 1, ("recover",), (), "measure the student in torch")
_VALIDATE_GGUF = Stage(
    "validate_gguf",
    1,
    ("gguf",),
    ("budget", "onnx"),  # it records what it says if the other file holds the same numbers
    "measure the GGUF in llama.cpp",
    crash_is_a_finding=True,
)
_VALIDATE_ONNX = Stage(
    "validate_onnx",
    1,
    ("onnx", "validate_gguf"),
    ("budget",),
    "measure the ONNX in ONNX Runtime",
    crash_is_a_finding=True,
)

ALL_STAGES = (
    _CALIBRATE,
    _COMPRESS,
    _SCHEDULE,
    _RECOVER,
    _GGUF,
    _ONNX,
    _STUDENT,
    _VALIDATE_TORCH,
    _VALIDATE_GGUF,
    _VALIDATE_ONNX,
)
"""In the order in which they run; a plan leaves out those of artifacts that it does not write."""


class StageError(MoeExportError):
    """A stage failed; carries the exit code that the stage asked for."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def stages_of(plan: Plan) -> tuple[Stage, ...]:
    """The stages of a plan, each after those it needs."""
    recipe = plan.recipe
    wanted = {
        _GGUF: recipe.gguf is not None,
        _VALIDATE_GGUF: recipe.gguf is not None,
        _ONNX: recipe.onnx is not None,
        _VALIDATE_ONNX: recipe.onnx is not None,
        _STUDENT: recipe.save_student,
    }
    return tuple(stage for stage in ALL_STAGES if wanted.get(stage, True))


def run_stages(
    plan: Plan, work: WorkDirectory, stages: Sequence[Stage], announce: Callable[[str], None]
) -> dict[str, StageRecord]:
    """Runs what is not finished, each stage in its own process, and returns all records.

    Raises:
        StageError: a stage failed; what was finished stays.
    """
    expected = fingerprints(plan, stages)
    records: dict[str, StageRecord] = {}
    for number, stage in enumerate(stages, start=1):
        record = work.record(stage.name)
        if record is not None and record.fingerprint == expected[stage.name]:
            announce(f"[{number}/{len(stages)}] {stage.what}: done already")
        else:
            announce(f"[{number}/{len(stages)}] {stage.what}")
            record = _run(stage, work, expected[stage.name])
            announce(f"      {record.seconds:.0f} s, {record.peak_rss_bytes / 1e6:.0f} MB")
        records[stage.name] = record
    return records


def fingerprints(plan: Plan, stages: Sequence[Stage]) -> dict[str, str]:
    """For each stage a digest of everything that its outputs depend on, the stages it needs included.

    Raises:
        InputError: the source cannot be read.
    """
    digests: dict[str, str] = {}
    for stage in stages:
        digests[stage.name] = _fingerprint(stage, plan, digests)
    return digests


def _run(stage: Stage, work: WorkDirectory, fingerprint: str) -> StageRecord:
    output = work.begin(stage.name, fingerprint, resumes=stage.resumes)
    (output / OUTCOME).unlink(missing_ok=True)  # a killed run may not have read it
    start = time.monotonic()
    command = [sys.executable, "-m", "exporter.stage", str(work.folder), stage.name, str(os.getpid())]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    seconds = time.monotonic() - start
    outcome = _outcome(output)
    if outcome is None:
        crash = f"the process {_how_it_ended(process.returncode)} without a message"
        if not stage.crash_is_a_finding:
            raise StageError(f"stage {stage.name}: {crash}; the run can be resumed with the same command", 1)
        record = StageRecord(fingerprint, seconds, 0, crash)
    elif outcome["error"] is not None:
        raise StageError(outcome["error"], outcome["exit_code"])
    else:
        record = StageRecord(fingerprint, seconds, outcome["peak_rss_bytes"])
    work.finish(stage.name, record)
    return record


def _outcome(output: Path) -> Mapping[str, Any] | None:
    try:
        outcome: Mapping[str, Any] = json.loads((output / OUTCOME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    (output / OUTCOME).unlink()
    return outcome


def _how_it_ended(returncode: int) -> str:
    if returncode < 0:
        return f"died with {signal.Signals(-returncode).name}"
    return f"ended with code {returncode}"


def _fingerprint(stage: Stage, plan: Plan, earlier: Mapping[str, str]) -> str:
    recipe = plan.recipe.model_dump()
    parts = {
        "stage": [stage.name, stage.version],
        "choices": {choice: recipe[choice] for choice in stage.choices},
        "needs": [earlier[name] for name in stage.needs if name in earlier],
        "source": _source_state(plan.source) if not stage.needs else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _source_state(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of the checkpoint's files: a change starts the run again."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror})") from None
