"""The files that stages hand to each other, by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from compressors.calibration.statistics import Importance, StoredStatistics, importance, importance_of_kept
from compressors.model.running.memory import MemoryLimit
from compressors.model.sources.checkpoint import Checkpoint
from compressors.model.sources.student import Student
from exporter.estimating.planned_types import hold_same_numbers
from exporter.pipeline.stage import StageContext
from exporter.pipeline.work import WorkDirectory
from exporter.planning.plan import Plan
from exporter.writing.gguf.imatrix import read_imatrix

__all__ = [
    "ORIGINAL_VALUES",
    "Blocks",
    "Calibration",
    "StudentFiles",
    "importance_of",
    "memory_limit",
    "open_student",
    "same_numbers",
    "use_threads",
]


ORIGINAL_VALUES = "original_values.safetensors"
"""The tunable values of a file as a stage wrote them (:mod:`exporter.writing.tuning`), in the folder of that stage."""


@dataclass(frozen=True)
class Blocks:
    """The token blocks of the three splits: int64 [B, T] each."""

    calibration: torch.Tensor
    selection: torch.Tensor
    heldout: torch.Tensor

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        save_file(dict(vars(self)), path)

    @classmethod
    def load(cls, path: Path) -> Blocks:
        """The inverse of :meth:`save`."""
        return cls(**load_file(path))


@dataclass(frozen=True)
class Calibration:
    """The files that the teacher's pass leaves behind."""

    folder: Path

    @property
    def blocks(self) -> Path:
        """Token blocks of all splits."""
        return self.folder / "blocks.safetensors"

    @property
    def statistics(self) -> Path:
        """Sums over the calibration tokens: a folder with a file for each layer."""
        return self.folder / "statistics"

    @property
    def layer_inputs(self) -> Path:
        """The inputs of each of the teacher's layers, and of its head, for the first calibration tokens: a folder."""
        return self.folder / "layer_inputs"

    @property
    def targets(self) -> Path:
        """The teacher's most probable next tokens at every calibration token: a folder."""
        return self.folder / "targets"

    @property
    def selection_log_probs(self) -> Path:
        """The teacher's full log-probabilities at the scored selection positions."""
        return self.folder / "selection"

    @property
    def heldout_log_probs(self) -> Path:
        """The teacher's full log-probabilities at the scored held-out positions."""
        return self.folder / "heldout"

    @property
    def routing(self) -> Path:
        """The teacher's routing of all held-out tokens."""
        return self.folder / "routing.safetensors"

    @property
    def summary(self) -> Path:
        """The figures of texts and teacher for the report (JSON)."""
        return self.folder / "summary.json"

    @property
    def heldout_domains(self) -> list[str]:
        """The domain of each held-out chunk: the name of the file that it is from."""
        domains: list[str] = json.loads(self.summary.read_text(encoding="utf-8"))["heldout_domains"]
        return domains

    @property
    def last_words(self) -> Path:
        """The places where sentences and lines of the held-out text end with a word (JSON)."""
        return self.folder / "last_words.json"

    def layer_statistics(self, n_layers: int) -> StoredStatistics:
        """The sums; each layer's are read when they are asked for."""
        return StoredStatistics(self.statistics, n_layers)

    @classmethod
    def of(cls, work: WorkDirectory) -> Calibration:
        """The files of the finished stage."""
        return cls(work.stage("calibrate"))


@dataclass(frozen=True)
class StudentFiles:
    """The files of a student: its map of experts, and the tensors that changed."""

    folder: Path

    @property
    def expert_map(self) -> Path:
        """The student's experts in terms of the teacher's (JSON)."""
        return self.folder / "expert_map.json"

    def rung_overlay(self, number: int) -> Path:
        """The tensors that a rung of recovery changed (safetensors); absent where it was not kept."""
        return self.folder / f"rung-{number}.safetensors"

    def rung_result(self, number: int) -> Path:
        """The result of a finished rung (JSON)."""
        return self.folder / f"rung-{number}.json"

    @property
    def rungs(self) -> list[Path]:
        """Overlays of the rungs that were kept, the last first."""
        return sorted(self.folder.glob("rung-*.safetensors"), reverse=True)

    def layer_overlay(self, layer: int) -> Path:
        """The tensors that compression changed in a student's layer (safetensors); absent if there are none."""
        return self.folder / f"overlay-{layer:03d}.safetensors"

    @property
    def statistics(self) -> Path:
        """Sums over the calibration tokens as the student sees them; absent where its experts are the teacher's."""
        return self.folder / "statistics"

    def open(self, source: Checkpoint, recovered: Sequence[Path] = ()) -> Student:
        """The student, with recovery's changes: the first of these overlays that has a tensor wins.

        Raises:
            InputError: a file is missing or damaged.
        """
        return Student.load(source, self.expert_map, [*recovered, *sorted(self.folder.glob("overlay-*.safetensors"))])

    @property
    def recovery(self) -> Path:
        """The rungs that were tried (JSON)."""
        return self.folder / "recovery.json"


def open_student(plan: Plan, work: WorkDirectory, stage: str = "recover") -> Student:
    """The student as a stage left it: ``compress``, or ``recover``, the last to change it."""
    taught = StudentFiles(work.stage("recover")).rungs if stage == "recover" else []
    return StudentFiles(work.stage("compress")).open(Checkpoint(plan.source), taught)


def same_numbers(plan: Plan) -> bool:
    """True if both files hold the same numbers, so that the runtimes can be compared with each other."""
    return hold_same_numbers(plan.recipe, plan.student_spec)


def importance_of(student: Student, plan: Plan, work: WorkDirectory) -> Importance:
    """The importance matrix of a student's weights.

    The one of ``--imatrix`` is of the original's columns. Where experts have weights of their own, their statistics on
    the calibration text are used instead.
    """
    own = StudentFiles(work.stage("compress")).statistics
    if own.exists():
        return importance(StoredStatistics(own, student.spec.n_layers), student.experts.of_itself(), student.spec)
    if plan.imatrix is not None:
        return importance_of_kept(read_imatrix(plan.imatrix, plan.teacher_spec), student.experts)
    statistics = Calibration.of(work).layer_statistics(student.source.spec.n_layers)
    return importance(statistics, student.experts, student.spec)


def memory_limit(context: StageContext) -> MemoryLimit:
    """The limit that ``--memory`` sets for a stage; arrays that do not fit lie in the stage's folder while it runs."""
    return MemoryLimit(context.plan.memory_bytes, context.output / "spill")


def use_threads(plan: Plan) -> None:
    """Fixes torch's threads and algorithms: results depend on both."""
    torch.set_num_threads(plan.recipe.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # or all is written twice
