"""The stages in order: which depends on what, which are done already, and running the others one by one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from compressors.model.errors import InputError, MoeExportError
from exporter.pipeline.source_state import SourceState
from exporter.pipeline.stage import source_error
from exporter.pipeline.stage_process import Death, run_in_process
from exporter.pipeline.team import Team
from exporter.pipeline.work import StageRecord, WorkDirectory
from exporter.planning.plan import Plan

__all__ = [
    "ALL_STAGES",
    "Stage",
    "StageError",
    "fingerprints",
    "follow",
    "pareto_stages",
    "run_stages",
    "search_stages",
    "source_of_run",
    "stages_of",
    "unfinished",
]


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
    shared: bool = False  # all processes of a team take part
    crash_is_a_finding: bool = False  # it runs somebody else's runtime, whose death is a result


_CALIBRATE = Stage(
    "calibrate",
    6,
    (),
    ("source", "text", "arithmetic", "threads"),
    "run the teacher over the calibration text",
    resumes=True,
    shared=True,
)
_SENSITIVITY = Stage(
    "sensitivity", 1, ("calibrate",), ("arithmetic",), "measure what each tensor's errors do to the output"
)
_SEARCH = Stage(
    "search",
    1,
    ("calibrate", "sensitivity"),
    ("budget", "compress", "recover", "gguf", "onnx"),
    "search for the best file that fits",
    resumes=True,
)
_PARETO = Stage(
    "pareto",
    1,
    ("calibrate", "sensitivity"),
    ("recover", "gguf"),
    "measure files of each size, and the baselines, in llama.cpp",
    resumes=True,
)
_COMPRESS = Stage("compress", 2, ("calibrate",), ("compress", "arithmetic"), "compress the experts")
_SCHEDULE = Stage("schedule", 3, ("compress",), ("recover", "arithmetic"), "time a step of recovery", shared=True)
_RECOVER = Stage(
    "recover",
    3,
    ("compress", "schedule"),
    ("recover", "arithmetic"),
    "recover what compressing lost",
    resumes=True,
    shared=True,
)
_GGUF = Stage("gguf", 2, ("recover", "sensitivity"), ("gguf",), "write the GGUF file", resumes=True)
_ONNX = Stage("onnx", 4, ("recover", "sensitivity"), ("onnx", "budget"), "write the ONNX folder", resumes=True)
_RETUNE = Stage(
    "retune",
    2,
    ("recover", "schedule", "gguf", "onnx"),
    ("recover", "arithmetic"),
    "tune each file beside its codes",
    resumes=True,
    shared=True,
)
_STUDENT = Stage("student", 3, ("recover",), (), "write the student checkpoint", resumes=True)
_TEACHER_TEXTS = Stage("teacher_texts", 1, ("calibrate",), (), "let the original write a few texts")
_VALIDATE_TORCH = Stage("validate_torch", 4, ("recover",), (), "measure the student in torch")
_VALIDATE_WRITTEN = Stage("validate_written", 2, ("gguf", "onnx", "retune"), (), "measure the written weights in torch")
_VALIDATE_GGUF = Stage(
    "validate_gguf",
    5,
    ("gguf", "retune", "validate_torch", "validate_written"),
    ("budget", "onnx"),  # it records what it says if the other file holds the same numbers
    "measure the GGUF in llama.cpp",
    crash_is_a_finding=True,
)
_VALIDATE_ONNX = Stage(
    "validate_onnx",
    4,
    ("onnx", "retune", "validate_torch", "validate_written", "validate_gguf"),
    ("budget",),
    "measure the ONNX in ONNX Runtime",
    crash_is_a_finding=True,
)
_TEACHER_GGUF = Stage(
    "teacher_gguf",
    2,
    ("calibrate",),
    ("budget",),
    "measure the original in llama.cpp",
    crash_is_a_finding=True,
)
_TEACHER_ONNX = Stage(
    "teacher_onnx", 1, ("calibrate",), (), "measure the original in ONNX Runtime", crash_is_a_finding=True
)

_FEW = 2  # stages to be run, that start sooner by themselves than from a server that imports what all stages need

ALL_STAGES = (
    _CALIBRATE,
    _SENSITIVITY,
    _SEARCH,
    _PARETO,
    _COMPRESS,
    _SCHEDULE,
    _RECOVER,
    _GGUF,
    _ONNX,
    _RETUNE,
    _STUDENT,
    _TEACHER_TEXTS,
    _VALIDATE_TORCH,
    _VALIDATE_WRITTEN,
    _VALIDATE_GGUF,
    _VALIDATE_ONNX,
    _TEACHER_GGUF,
    _TEACHER_ONNX,
)
"""In the order in which they run; a plan leaves out those of artifacts that it does not write."""


class StageError(MoeExportError):
    """A stage failed; carries the exit code that the stage asked for."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def stages_of(plan: Plan) -> tuple[Stage, ...]:
    """The stages of a plan, each after those it needs, but for the search: they build what the recipe says."""
    recipe = plan.recipe
    wanted = {
        _SENSITIVITY: recipe.chooses_codes,
        _SEARCH: False,
        _PARETO: False,
        _GGUF: recipe.gguf is not None,
        _VALIDATE_GGUF: recipe.gguf is not None,
        _ONNX: recipe.onnx is not None,
        _VALIDATE_ONNX: recipe.onnx is not None,
        _RETUNE: recipe.recover.after_quantizing is not None,
        _STUDENT: recipe.save_student,
        _TEACHER_GGUF: "gguf" in plan.teacher_floors and recipe.gguf is not None,
        _TEACHER_ONNX: "onnx" in plan.teacher_floors and recipe.onnx is not None,
    }
    return tuple(stage for stage in ALL_STAGES if wanted.get(stage, True))


def search_stages(plan: Plan) -> tuple[Stage, ...]:
    """The stages that find the recipe of a plan that leaves it open."""
    assert plan.search is not None, "its recipe stands"
    return (_CALIBRATE, _SENSITIVITY, _SEARCH)


def pareto_stages() -> tuple[Stage, ...]:
    """The stages that measure a curve of divergence against bytes."""
    return (_CALIBRATE, _SENSITIVITY, _PARETO)


def run_stages(
    plan: Plan,
    work: WorkDirectory,
    stages: Sequence[Stage],
    announce: Callable[[str], None],
    team: Team | None = None,
) -> dict[str, StageRecord]:
    """Runs what is not finished, each stage in its own process, and returns all records.

    A ``team`` takes part in the stages that can be shared.

    Raises:
        InputError: the checkpoint is not the one that the run began with.
        StageError: a stage failed; what was finished stays.
    """
    source, touched = source_of_run(plan, work)
    if touched is not None:
        announce(f"{plan.source}: {touched} since this run began: starting again from {_CALIBRATE.name}")
    source.save(work.source_path)
    expected = fingerprints(plan, stages, source)
    records: dict[str, StageRecord] = {}
    few = len(unfinished(plan, work, stages)) <= _FEW
    for number, stage in enumerate(stages, start=1):
        record = work.record(stage.name)
        if record is not None and record.fingerprint == expected[stage.name]:
            announce(f"[{number}/{len(stages)}] {stage.what}: done already")
        else:
            announce(f"[{number}/{len(stages)}] {stage.what}")
            record = _run(stage, plan, work, expected[stage.name], team if stage.shared else None, alone=few)
            announce(f"      {record.seconds:.0f} s, {record.peak_rss_bytes / 1e6:.0f} MB")
        records[stage.name] = record
    return records


def source_of_run(plan: Plan, work: WorkDirectory) -> tuple[SourceState, str | None]:
    """The checkpoint's state, with which every stage compares what it finds.

    Returns:
        The state, and which file was touched since the run began, its size and header being the same, if one was.

    Raises:
        InputError: the checkpoint is not the one that the run began with, or cannot be read.
    """
    now, began = SourceState.of(plan.source), SourceState.load(work.source_path)
    if began is None:
        return now, None
    change = began.change_to(now)
    if change is None:
        return began, None
    if not change.touched_only:
        raise InputError(
            f"{plan.source} is not the model that this run began with: {change.what}; put the original back, or "
            f"remove {work.folder} to begin anew"
        )
    return now, change.what


def unfinished(plan: Plan, work: WorkDirectory, stages: Sequence[Stage]) -> list[str]:
    """Names of the stages that are still to be run.

    Raises:
        InputError: the checkpoint is not the one that the run began with.
    """
    expected = fingerprints(plan, stages, source_of_run(plan, work)[0])
    records = {stage.name: work.record(stage.name) for stage in stages}
    return [name for name, record in records.items() if record is None or record.fingerprint != expected[name]]


def fingerprints(plan: Plan, stages: Sequence[Stage], source: SourceState) -> dict[str, str]:
    """Returns for each stage a digest of all that its outputs depend on, including the stages it needs."""
    digests: dict[str, str] = {}
    for stage in stages:
        digests[stage.name] = _fingerprint(stage, plan, source, digests)
    return digests


def _fingerprint(stage: Stage, plan: Plan, source: SourceState, earlier: Mapping[str, str]) -> str:
    recipe = plan.recipe.model_dump()
    parts = {
        "stage": [stage.name, stage.version],
        "choices": {choice: recipe[choice] for choice in stage.choices},
        "needs": [earlier[name] for name in stage.needs if name in earlier],
        "source": asdict(source) if not stage.needs else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _run(
    stage: Stage, plan: Plan, work: WorkDirectory, fingerprint: str, team: Team | None, *, alone: bool
) -> StageRecord:
    with work.stage_lock():
        work.begin(stage.name, fingerprint, resumes=stage.resumes)
    start = time.monotonic()
    end = run_in_process(work, stage.name, None if team is None else team.call(_call(work, stage)), alone=alone)
    seconds = time.monotonic() - start
    if isinstance(end, Death):
        record = StageRecord(fingerprint, seconds, 0, _crash(stage, plan, work, end))
    elif end.error is not None and stage.crash_is_a_finding and end.is_finding:
        record = StageRecord(fingerprint, seconds, end.peak_rss_bytes, end.error)
    elif end.error is not None:
        raise StageError(end.error, end.exit_code)
    else:
        record = StageRecord(fingerprint, seconds, end.peak_rss_bytes)
    work.finish(stage.name, record)
    return record


def follow(team: Team) -> None:
    """Makes the other processes of a team take part in the stages that the first one calls them to.

    A stage that fails, fails in the first process too, which says so.
    """
    for what, group in team.calls():
        call = json.loads(what)
        run_in_process(WorkDirectory.from_json(call["work"]), call["stage"], group)


def _call(work: WorkDirectory, stage: Stage) -> str:
    return json.dumps({"work": work.to_json(), "stage": stage.name})


def _crash(stage: Stage, plan: Plan, work: WorkDirectory, death: Death) -> str:
    """Says how a runtime crashed, if it did; any other death ends the run, which can be resumed."""
    changed = source_error(plan, work)  # a file that was cut off while it was mapped into memory
    if changed is not None:
        raise StageError(str(changed), changed.exit_code)
    if stage.crash_is_a_finding and death.is_a_crash:
        return f"the process {death}"
    raise StageError(f"stage {stage.name}: its process {death}; {death.advice}", 1)
