"""The inputs that several stages open: token blocks, the student, its files; and the stages' limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from compressors.calibration.statistics import Importance, StoredStatistics, importance, importance_of_kept
from compressors.model.description.spec import ModelSpec
from compressors.model.files.tokenizer_files import load_tokenizer
from compressors.model.predictions.head_inputs import HeadInputs, RemadeLogProbs
from compressors.model.running.memory import MemoryLimit
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import Student
from compressors.model.sources.weights import WrittenWeights
from exporter.file_names import BLOCKS, STATISTICS, StageFile
from exporter.planning.plan import Plan
from exporter.stages.finished import artifact_path, heldout_domains, open_student, scheduled_blocks, student_of_files
from exporter.work.directory import WorkDirectory
from exporter.work.stage import StageContext
from exporter.writing.gguf.imatrix import read_imatrix
from validate.metrics.generation import GeneratedTexts, example_of, generation_figures

__all__ = [
    "Blocks",
    "artifact_path",
    "heldout_domains",
    "importance_of",
    "memory_limit",
    "open_student",
    "own_statistics",
    "scheduled_blocks",
    "student_of_files",
    "teacher_predictions",
    "teacher_statistics",
    "text_figures",
    "token_blocks",
    "use_threads",
    "written_weights",
]


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


def token_blocks(work: WorkDirectory) -> Blocks:
    """The token blocks that calibration cut the texts into."""
    return Blocks.load(work.path("calibrate", BLOCKS))


def text_figures(plan: Plan, prompts_PT: npt.NDArray[np.int64], texts: GeneratedTexts) -> dict[str, Any]:
    """The report's figures of the texts that a model wrote, and one of them to read."""
    tokenizer = load_tokenizer(plan.open_source().tokenizer_folder)
    example = example_of(prompts_PT, texts, plan.end_tokens, lambda tokens: str(tokenizer.decode(tokens)))
    return generation_figures(texts, plan.end_tokens) | {"example": example}


def teacher_predictions(plan: Plan, work: WorkDirectory, split: StageFile) -> RemadeLogProbs:
    """The teacher's log-probabilities at a split's scored positions; its head is read for them.

    Raises:
        InputError: a file is missing or damaged.
    """
    inputs = HeadInputs(work.path("calibrate", split))
    return RemadeLogProbs(inputs, Student.teacher(plan.open_source()), torch.device(plan.device))


def teacher_statistics(plan: Plan, work: WorkDirectory) -> StoredStatistics:
    """The teacher's sums over the calibration tokens; each layer's are read when they are asked for."""
    return StoredStatistics(work.path("calibrate", STATISTICS), len(plan.teacher_spec.blocks))


def own_statistics(student: Student, work: WorkDirectory) -> StoredStatistics | None:
    """The sums as the student's experts see them; None where its experts are the teacher's."""
    path = work.path("compress", STATISTICS)
    return StoredStatistics(path, len(student.spec.blocks)) if path.exists() else None


def importance_of(student: Student, plan: Plan, work: WorkDirectory) -> Importance:
    """The importance matrix of a student's weights.

    The matrix of ``--imatrix`` is about the original's columns. If experts have weights of their own, their statistics
    on the calibration text are used instead.
    """
    own = own_statistics(student, work)
    if own is not None:
        return importance(own, student.experts.of_itself(), student.spec)
    if plan.imatrix is not None:
        return importance_of_kept(read_imatrix(plan.imatrix, plan.teacher_spec), student.experts)
    return importance(teacher_statistics(plan, work), student.experts, student.spec)


def written_weights(
    plan: Plan, work: WorkDirectory, spec: ModelSpec, artifacts: Sequence[str] | None = None
) -> dict[str, WrittenWeights]:
    """The files that a plan writes, or some of them, opened, by artifact."""
    readers: Mapping[str, Callable[[Path, ModelSpec], WrittenWeights]] = {"gguf": GgufWeights, "onnx": OnnxWeights}
    return {name: readers[name](artifact_path(work, name), spec) for name in artifacts or plan.recipe.artifacts}


def memory_limit(context: StageContext, beside: int = 0) -> MemoryLimit:
    """The limit that ``--memory`` sets for a stage; arrays that do not fit lie in the stage's folder while it runs.

    Args:
        context: the context of the stage.
        beside: bytes that another process of the stage takes meanwhile.
    """
    return MemoryLimit(context.plan.memory_bytes - beside, context.output / "spill")


def use_threads(plan: Plan) -> None:
    """Fixes torch's threads and algorithms: results depend on both."""
    torch.set_num_threads(plan.recipe.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # or all is written twice
