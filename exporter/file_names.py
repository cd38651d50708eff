"""The names of all files that stages hand to each other or keep, and of all that OUT holds. They stand nowhere else.

A name here has a meaning in the folder of a stage; :mod:`exporter.stages.table` says which stage writes it and which
stages read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressors.model.files.onnx_names import DATA_FILE, MODEL_FILE


@dataclass(frozen=True)
class StageFile:
    """A file, or a folder of files, that a stage leaves in its folder."""

    name: str
    """Its path below the stage's folder. Where there may be several, the part that differs is in braces."""

    def within(self, folder: Path, **values: Any) -> Path:
        """The file below a folder; ``values`` fill the braces."""
        return folder / self.name.format(**values)

    def all_within(self, folder: Path) -> list[Path]:
        """The files of this name that lie below a folder, whatever stands for the braces, in the order of names."""
        return sorted(folder.glob(self.pattern))

    @property
    def pattern(self) -> str:
        """The name as a pattern that matches whatever stands for the braces."""
        return re.sub(r"\{[^}]*\}", "*", self.name)


# ---- of several stages
STATISTICS = StageFile("statistics")
"""Sums over the calibration tokens: a folder with a file for each layer. A student has its own where its experts are
not the teacher's."""
EVALUATION = StageFile("evaluation.safetensors")
"""The predictions and the routing of a model on the held-out text."""
ROUTING = StageFile("routing.safetensors")
"""The teacher's routing of held-out tokens, in torch."""
ORIGINAL_VALUES = StageFile("original_values.safetensors")
"""The tunable values of a file as it was written (:mod:`exporter.writing.tuning`)."""
RECOVERY = StageFile("recovery.json")
"""The rungs that were tried."""
LOG_PROBS = StageFile("log_probs")
"""The log-probabilities of a file in its runtime at the scored held-out positions; only where another one is compared
with them."""

# ---- calibrate
BLOCKS = StageFile("blocks.safetensors")
"""The token blocks of all three splits."""
LAYER_INPUTS = StageFile("layer_inputs")
"""The inputs of each of the teacher's layers, and of its head, for the first calibration tokens."""
OWN_LAYER_INPUTS = StageFile("own_layer_inputs")
"""The same, while a file is written, of a student that differs, or of the teacher where its own are gone."""
TARGETS = StageFile("targets")
"""The teacher's most probable next tokens at every calibration token."""
SELECTION_PREDICTIONS = StageFile("selection.npy")
"""The teacher's predictions at the scored selection positions, as the inputs of its head."""
HELDOUT_PREDICTIONS = StageFile("heldout.npy")
"""The teacher's predictions at the scored held-out positions, as the inputs of its head."""
SUMMARY = StageFile("summary.json")
"""The figures of texts and teacher for the report."""
LAST_WORDS = StageFile("last_words.json")
"""The places where sentences and lines of the held-out text end with a word."""

# ---- sensitivity, teacher_texts
SENSITIVITIES = StageFile("")
"""All of the stage's folder (:class:`compressors.sensitivity.matrices.Sensitivities`)."""
GENERATION = StageFile("generation.json")
"""The figures of the teacher's texts."""
TEXT_EFFORT = StageFile("effort.json")
"""How many passes over the teacher its texts took, and how many drafted tokens were right."""

# ---- search, pareto
FOUND = StageFile("found.json")
"""The recipes that the search found, and all candidates."""
EFFORT = StageFile("effort.json")
"""The number of files that the search measures."""
TRIAL = StageFile("trial-{number}")
"""The work of the search on one structure."""
ROWS = StageFile("pareto.csv")
"""The rows of a curve of divergence against bytes."""
BUILD = StageFile("build")
"""The work on the file that is measured for the curve."""

# ---- compress, schedule, recover, retune
EXPERT_MAP = StageFile("expert_map.json")
"""The student's experts in terms of the teacher's."""
OVERLAY = StageFile("overlay-{layer:03d}.safetensors")
"""The tensors that compression changed in a layer; absent if there are none."""
SCHEDULE = StageFile("schedule.json")
"""The numbers of blocks that recovery takes."""
RUNG_OVERLAY = StageFile("rung-{number}.safetensors")
"""The tensors that a rung of recovery changed; absent where it was not kept."""
RUNG_RESULT = StageFile("rung-{number}.json")
"""The result of a finished rung."""
RATE_RESULT = StageFile("trial-{number}-{rate:g}.json")
"""The divergence after a short trial of a learning rate."""
RETUNED: Mapping[str, StageFile] = {artifact: StageFile(artifact) for artifact in ("gguf", "onnx")}
"""The rungs of a file that was tuned, by artifact, in the stage that tunes it."""

# ---- gguf, onnx, student
GGUF_FILE = StageFile("{name}.gguf")
ONNX_FOLDER = StageFile("onnx")
STUDENT_FOLDER = StageFile("student")
"""The student as a checkpoint that stock transformers loads."""

# ---- validate_*, teacher_gguf, teacher_onnx
WRITTEN_EVALUATION = StageFile("{artifact}/evaluation.safetensors")
"""The evaluation of a file's numbers in torch."""
WRITTEN_PREDICTIONS = StageFile("{artifact}/predictions.npy")
"""The predictions of a file's numbers in torch, as the inputs of their head."""
ROUTER_INPUTS = StageFile("{artifact}/router_inputs")
"""The inputs of the routers in torch with a file's numbers; a student without routers has none."""
MEASUREMENT = StageFile("measurement.json")
"""The figures of a file in its runtime."""
COST = StageFile("cost.json")
"""The memory and the speed of the original in a runtime; null if its first layers alone were measured."""

# ---- of the work folder itself
JOB = "job.json"
PLAN = "plan.json"
SOURCE_STATE = "source.json"
STAGE_RECORD = "stage.json"
STAGE_FINGERPRINT = "stage.fingerprint"
RUN_LOCK = "lock"
STAGE_LOCK = "stage.lock"
ASSEMBLED = "output"
"""OUT while it is put together."""
RESULTS = "results"
"""OUT while it is put together from several parts, or of a curve."""

# ---- OUT; the GGUF file, the folder of the ONNX model and the student have the same names as in their stages
RECIPE = "recipe.yaml"
REPORT = "report.json"
REPORT_PAGE = "report.html"
MODEL_CARD = "README.md"
SUMS = "SHA256SUMS"
ONNX_WEIGHTS = (f"{ONNX_FOLDER.name}/{MODEL_FILE}", f"{ONNX_FOLDER.name}/{DATA_FILE}")
"""The graph and its weights."""
SHARED_BASES = "shared_bases.json"
"""In a saved student's folder: the experts that stand on shared bases, by layer."""
CURVE_TABLE = "pareto.md"
CURVE_PLOT = "pareto.png"
CURVE_PAGE = "pareto.html"

# ---- beside OUT
WORK_SUFFIX = ".work"
LOCK_SUFFIX = ".lock"
PARTIAL_SUFFIX = ".partial"
RECIPE_SUFFIX = ".recipe.yaml"
