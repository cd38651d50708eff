"""All stages in the order in which they run: the files that each reads and writes, and its other dependencies.

Each must name every file of another stage that it opens, because it cannot open others. Dependencies follow from that;
a plan leaves out the stages of artifacts that it does not write.
"""

from __future__ import annotations

from exporter.file_names import (
    BLOCKS,
    BUILD,
    COST,
    EFFORT,
    EVALUATION,
    EXPERT_MAP,
    FOUND,
    GENERATION,
    GGUF_FILE,
    HELDOUT_PREDICTIONS,
    LAST_WORDS,
    LAYER_INPUTS,
    LOG_PROBS,
    MEASUREMENT,
    ONNX_FOLDER,
    ORIGINAL_VALUES,
    OVERLAY,
    RATE_RESULT,
    RECOVERY,
    RETUNED,
    ROUTER_INPUTS,
    ROUTING,
    ROWS,
    RUNG_OVERLAY,
    RUNG_RESULT,
    SCHEDULE,
    SELECTION_PREDICTIONS,
    SENSITIVITIES,
    STATISTICS,
    STUDENT_FOLDER,
    SUMMARY,
    TARGETS,
    TEXT_EFFORT,
    TRIAL,
    WRITTEN_EVALUATION,
    WRITTEN_PREDICTIONS,
)
from exporter.work.directory import Reads
from exporter.work.stage import Stage, files_of

__all__ = [
    "ALL_STAGES",
    "CALIBRATE",
    "COMPRESS",
    "GGUF",
    "OF_ALL_BUDGETS",
    "OF_ALL_FILES",
    "OF_THE_REPORT",
    "OF_THE_RUN",
    "ONNX",
    "PARETO",
    "RECOVER",
    "RETUNE",
    "SCHEDULING",
    "SEARCH",
    "SENSITIVITY",
    "STUDENT",
    "TEACHER_GGUF",
    "TEACHER_ONNX",
    "TEACHER_TEXTS",
    "VALIDATE_GGUF",
    "VALIDATE_ONNX",
    "VALIDATE_TORCH",
    "VALIDATE_WRITTEN",
]

# ---- files that several stages open, each with the function that opens them
_BLOCKS = files_of("calibrate", BLOCKS)
_COMPRESSED = files_of("compress", EXPERT_MAP, OVERLAY)  # inputs.open_student
_STUDENT = _COMPRESSED | files_of("recover", RUNG_OVERLAY)  # inputs.open_student
_FILES = files_of("gguf", GGUF_FILE) | files_of("onnx", ONNX_FOLDER)  # inputs.written_weights
_STATISTICS = files_of("compress", STATISTICS) | files_of("calibrate", STATISTICS)  # inputs.importance_of
_LAYER_INPUTS = files_of("calibrate", LAYER_INPUTS)
_FEEDBACK = _BLOCKS | _LAYER_INPUTS | files_of("sensitivity", SENSITIVITIES)  # feedback_for
_TRAINING = _BLOCKS | _STATISTICS | files_of("calibrate", TARGETS)  # training.training_of
_LADDER = _TRAINING | files_of("calibrate", SELECTION_PREDICTIONS) | files_of("schedule", SCHEDULE)  # recover.Ladder
_HELDOUT = _BLOCKS | files_of("calibrate", HELDOUT_PREDICTIONS)
_MAP = files_of("compress", EXPERT_MAP)  # finished.student_of_files
_SAME_WEIGHTS = files_of("validate_written", WRITTEN_PREDICTIONS, ROUTER_INPUTS) | _MAP

CALIBRATE = Stage(
    "calibrate",
    "teacher.calibrate",
    version=8,
    what="run the teacher over the calibration text",
    writes=(
        *(BLOCKS, STATISTICS, LAYER_INPUTS, TARGETS, SELECTION_PREDICTIONS, HELDOUT_PREDICTIONS, ROUTING),
        *(SUMMARY, LAST_WORDS),
    ),
    choices=("source", "text", "arithmetic", "threads", "keeps_layer_inputs", "keeps_targets", "selection_blocks"),
    resumes=True,
    shared=True,
)
SENSITIVITY = Stage(
    "sensitivity",
    "teacher.sensitivity",
    version=1,
    what="measure what each tensor's errors do to the output",
    reads=_BLOCKS,
    writes=(SENSITIVITIES,),
    choices=("arithmetic",),
)
COMPRESS = Stage(
    "compress",
    "student.compress",
    version=5,
    what="compress the experts",
    reads=_BLOCKS | files_of("calibrate", STATISTICS),
    writes=(EXPERT_MAP, OVERLAY, STATISTICS),
    choices=("compress", "arithmetic"),
)
SCHEDULING = Stage(
    "schedule",
    "student.schedule",
    version=3,
    what="time a step of recovery",
    reads=_COMPRESSED | _TRAINING,
    writes=(SCHEDULE,),
    choices=("recover", "arithmetic"),
    shared=True,
)
RECOVER = Stage(
    "recover",
    "student.recover",
    version=4,
    what="recover what compressing lost",
    reads=_COMPRESSED | _LADDER,
    writes=(RUNG_OVERLAY, RUNG_RESULT, RATE_RESULT, RECOVERY),
    choices=("recover", "arithmetic"),
    resumes=True,
    shared=True,
)
GGUF = Stage(
    "gguf",
    "files.writers",
    version=2,
    what="write the GGUF file",
    reads=_STUDENT | _STATISTICS | _FEEDBACK,
    takes=_LAYER_INPUTS,
    writes=(GGUF_FILE, ORIGINAL_VALUES),
    choices=("gguf",),
    resumes=True,
)
ONNX = Stage(
    "onnx",
    "files.writers",
    version=9,
    what="write the ONNX folder",
    reads=_STUDENT | _STATISTICS | _FEEDBACK,
    takes=_LAYER_INPUTS,
    writes=(ONNX_FOLDER, ORIGINAL_VALUES),
    choices=("onnx", "budget"),
    resumes=True,
)
RETUNE = Stage(
    "retune",
    "files.retune",
    version=2,
    what="tune each file beside its codes",
    reads=_STUDENT | _LADDER | _FILES | files_of("gguf", ORIGINAL_VALUES) | files_of("onnx", ORIGINAL_VALUES),
    writes=(RECOVERY, *RETUNED.values()),
    rewrites=_FILES,
    choices=("recover", "arithmetic"),
    resumes=True,
    shared=True,
)

OF_ALL_BUDGETS = frozenset({"calibrate", "sensitivity", "teacher_texts"})
"""The stages that the runs of several budgets share."""

OF_ALL_FILES = OF_ALL_BUDGETS | {"search"}
"""The stages that the runs of a search's results share too, where its files have students of their own."""

OF_THE_RUN = frozenset({"calibrate", "sensitivity"})
"""The stages whose files are shared by the stages that a search runs within itself for every structure."""


def _within(*stages: Stage) -> Reads:
    """The files of the run that these stages open where a search runs them."""
    return frozenset(pair for stage in stages for pair in stage.reads if pair[0] in OF_THE_RUN)


SEARCH = Stage(
    "search",
    "search.search",
    version=6,
    what="search for the best file that fits",
    reads=_within(COMPRESS, RECOVER, GGUF, ONNX),
    writes=(FOUND, EFFORT, TRIAL),
    choices=("budget", "compress", "recover", "gguf", "onnx"),
    resumes=True,
)
PARETO = Stage(
    "pareto",
    "search.pareto",
    version=1,
    what="measure files of each size, and the baselines, in llama.cpp",
    reads=_within(COMPRESS, SCHEDULING, RECOVER, GGUF, ONNX, RETUNE) | _HELDOUT,
    writes=(ROWS, TRIAL, BUILD),
    choices=("recover", "gguf"),
    resumes=True,
)
STUDENT = Stage(
    "student",
    "files.writers",
    version=4,
    what="write the student checkpoint",
    reads=_STUDENT,
    writes=(STUDENT_FOLDER,),
    resumes=True,
)
TEACHER_TEXTS = Stage(
    "teacher_texts",
    "teacher.texts",
    version=6,
    what="let the original write a few texts",
    reads=_BLOCKS,
    writes=(GENERATION, TEXT_EFFORT),
    is_helped_by=_FILES,  # one of them drafts the texts: parts of a run with other files share them
)
VALIDATE_TORCH = Stage(
    "validate_torch",
    "judge.reference",
    version=6,
    what="measure the student in torch",
    reads=_STUDENT | _HELDOUT | files_of("calibrate", ROUTING),
    writes=(EVALUATION,),
)
VALIDATE_WRITTEN = Stage(
    "validate_written",
    "judge.reference",
    version=3,
    what="measure the written weights in torch",
    reads=_MAP | _FILES | _BLOCKS,
    writes=(WRITTEN_EVALUATION, WRITTEN_PREDICTIONS, ROUTER_INPUTS),
)
VALIDATE_GGUF = Stage(
    "validate_gguf",
    "judge.runtimes",
    version=11,
    what="measure the GGUF in llama.cpp",
    reads=files_of("gguf", GGUF_FILE) | _HELDOUT | _SAME_WEIGHTS,
    writes=(EVALUATION, MEASUREMENT, LOG_PROBS),
    choices=("budget", "onnx"),  # it records its log-probabilities if the other file holds the same numbers
    crash_is_a_finding=True,
)
VALIDATE_ONNX = Stage(
    "validate_onnx",
    "judge.runtimes",
    version=7,
    what="measure the ONNX in ONNX Runtime",
    reads=files_of("onnx", ONNX_FOLDER) | _HELDOUT | _SAME_WEIGHTS | files_of("validate_gguf", LOG_PROBS),
    writes=(EVALUATION, MEASUREMENT),
    choices=("budget",),
    crash_is_a_finding=True,
)
TEACHER_GGUF = Stage(
    "teacher_gguf",
    "judge.floors",
    version=2,
    what="measure the original in llama.cpp",
    reads=_HELDOUT | files_of("calibrate", ROUTING),
    writes=(EVALUATION, ROUTING, COST),
    choices=("budget",),
    crash_is_a_finding=True,
)
TEACHER_ONNX = Stage(
    "teacher_onnx",
    "judge.floors",
    version=2,
    what="measure the original in ONNX Runtime",
    reads=_HELDOUT | files_of("calibrate", ROUTING),
    writes=(EVALUATION, ROUTING, COST),
    crash_is_a_finding=True,
)

OF_THE_REPORT = (
    _FILES
    | files_of("student", STUDENT_FOLDER)
    | files_of("calibrate", SUMMARY, ROUTING, LAST_WORDS)
    | files_of("search", FOUND)
    | files_of("compress", EXPERT_MAP)
    | files_of("schedule", SCHEDULE)
    | files_of("recover", RECOVERY)
    | files_of("retune", RECOVERY)
    | files_of("teacher_texts", GENERATION, TEXT_EFFORT)
    | files_of("validate_torch", EVALUATION)
    | files_of("validate_written", WRITTEN_EVALUATION)
    | files_of("validate_gguf", EVALUATION, MEASUREMENT)
    | files_of("validate_onnx", EVALUATION, MEASUREMENT)
    | files_of("teacher_gguf", EVALUATION, ROUTING, COST)
    | files_of("teacher_onnx", EVALUATION, ROUTING, COST)
)
"""The files that the report and OUT are made of."""

ALL_STAGES = (
    CALIBRATE,
    SENSITIVITY,
    SEARCH,
    PARETO,
    COMPRESS,
    SCHEDULING,
    RECOVER,
    GGUF,
    ONNX,
    RETUNE,
    STUDENT,
    TEACHER_TEXTS,
    VALIDATE_TORCH,
    VALIDATE_WRITTEN,
    VALIDATE_GGUF,
    VALIDATE_ONNX,
    TEACHER_GGUF,
    TEACHER_ONNX,
)
"""All stages, in the order in which they run."""
