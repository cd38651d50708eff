"""Measures one run: the teacher's results, and the students, are computed once and kept in a folder."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality.measure import MODELS
from benchmarks.quality.methods import Teacher
from benchmarks.recovery.arms import ARMS, Knowledge
from benchmarks.recovery.runs import LADDER_BLOCKS, SHORT_BLOCKS, Run
from benchmarks.recovery.students import ALL_EXPERTS_ON, STUDENTS, load_student, store_student
from benchmarks.recovery.unfinished import Unfinished
from compressors.calibration.splits import BLOCK_LENGTH, read_splits, tokenize
from compressors.calibration.statistics import StatisticsCollector, StoredStatistics, save_statistics
from compressors.calibration.teacher import TeacherTargets, write_targets
from compressors.model.description.spec import ModelSpec
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.running.expert_choice import AllExperts
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from compressors.recover.divergence import judge
from compressors.recover.schedule import Schedule
from compressors.recover.scopes import Scope
from compressors.recover.training import TrainingDivergedError
from compressors.recover.training_memory import training_bytes
from exporter.writing.files import write_atomically
from validate.metrics.evaluation import evaluate
from validate.runtimes.backend import scored_positions
from validate.runtimes.torch import TorchBackend

__all__ = ["HELDOUT_CHUNKS", "SELECTION_CHUNKS", "Measured", "load", "measure_into", "prepare"]

_TEXT = Path(__file__).parents[2] / "exporter/demo/text"
SELECTION_CHUNKS = 40
HELDOUT_CHUNKS = 50
_TRAINING_BLOCKS: Mapping[str, int] = {"fine": LADDER_BLOCKS, "coarse": SHORT_BLOCKS}

_MEMORY_BYTES = 6_000_000_000  # room enough for everything to stay

_TOKENS = "tokens.safetensors"
_SCORED = scored_positions(BLOCK_LENGTH)


@dataclass(frozen=True)
class Measured:
    """The result of a run. Divergences are full-vocabulary means over the scored positions, in nats."""

    run: Run
    selection: float | None  # divergence; None, here and below: training diverged
    perplexity: float | None  # of held-out text; None also where that was not looked at
    divergence: float | None  # of held-out text, likewise
    trained_parameters: int
    training_bytes: int  # float32 weights, gradients and Adam's moments, by arithmetic
    seconds: float  # processor time of the training
    peak_bytes: int  # of the process, after the training


def prepare(model: str, folder: Path) -> None:
    """Puts what the teacher knows, every student and, last, the tokens into the folder."""
    if (folder / _TOKENS).exists():
        return
    _settle()
    source = open_source(MODELS[model])
    calibration, selection, heldout = tokenize(
        read_splits(_TEXT / "calibration", _TEXT / "heldout"), source.tokenizer_folder
    )
    training_BT = _in_any_order(calibration.spread(LADDER_BLOCKS).tokens_BT)[: _TRAINING_BLOCKS[model]]
    judged = {
        "selection": selection.spread(SELECTION_CHUNKS).tokens_BT,
        "heldout": heldout.spread(HELDOUT_CHUNKS).tokens_BT,
    }
    _watch(source, training_BT, folder)
    for name, tokens_BT in judged.items():
        n_positions = len(tokens_BT) * (_SCORED.stop - _SCORED.start)
        writer = LogProbWriter(folder / name, n_positions, source.spec.vocab_size)
        evaluate(TorchBackend(Student.teacher(source)), tokens_BT.numpy(), {}, record=writer)
    statistics = StoredStatistics(folder / "statistics", source.spec.n_layers)
    for name, build in STUDENTS.items():
        store_student(build(Teacher(source, statistics, training_BT[:SHORT_BLOCKS])), folder / "students" / name)
    save_file({"training": training_BT, **judged}, folder / _TOKENS)


def _in_any_order(tokens_BT: torch.Tensor) -> torch.Tensor:
    """So that any leading part comes from all of each file, not from its beginning."""
    return tokens_BT[torch.randperm(len(tokens_BT), generator=torch.Generator().manual_seed(0))]


def _watch(source: Source, training_BT: torch.Tensor, folder: Path) -> None:
    """Writes statistics over the first training blocks, and the targets of all."""
    collector = StatisticsCollector(source.spec)
    model = StreamedModel(Student.teacher(source))
    parts = [range(SHORT_BLOCKS), range(SHORT_BLOCKS, len(training_BT))]
    observers = [[collector.observe], []]
    groups = [
        TokenGroup(training_BT[part.start : part.stop], watching)
        for part, watching in zip(parts, observers, strict=True)
        if part
    ]
    states = model.stream(groups)
    for layer in range(source.spec.n_layers):
        save_statistics(collector.take(layer), folder / "statistics", layer)
    targets = TeacherTargets.create(folder / "targets", training_BT.numel(), source.spec.vocab_size)
    for part, hidden in zip(parts, states, strict=False):
        write_targets(model, hidden, targets, part)


def measure(run: Run, folder: Path, unfinished: Unfinished) -> Measured:
    """Does a run on what :func:`prepare` left, in a process of its own: its peak memory is the process's so far."""
    _settle()
    source, tokens, arm = open_source(MODELS[run.model]), load_file(folder / _TOKENS), ARMS[run.arm]
    statistics = StoredStatistics(folder / "statistics", source.spec.n_layers)
    limit, targets = MemoryLimit(_MEMORY_BYTES, folder), TeacherTargets(folder / "targets")
    knowledge = Knowledge(source, statistics, tokens["training"], targets, limit, unfinished)
    student = load_student(source, folder / "students" / run.student)
    n_parameters, n_bytes = _size(arm.scope, student.spec)
    try:
        taught = arm.train(knowledge, student, _schedule(run)) if run.is_trained else student
    except TrainingDivergedError:
        taught = None
    seconds = unfinished.seconds
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    judged = (None, None, None) if taught is None else _judge(taught, run, tokens, folder)
    return Measured(run, *judged, n_parameters, n_bytes, seconds, peak_bytes)


def measure_into(path: Path, run: Run, folder: Path) -> None:
    """:func:`measure` with its result in a JSON file, which is complete or absent."""
    unfinished = Unfinished(folder / "unfinished" / path.stem)
    write_atomically(path, json.dumps(asdict(measure(run, folder, unfinished))))
    unfinished.remove()


def load(path: Path) -> Measured:
    """Reads what :func:`measure_into` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return Measured(**values | {"run": Run(**values["run"])})


def _schedule(run: Run) -> Schedule:
    updates = ARMS[run.arm].updates_per_batch
    return Schedule(run.n_blocks, run.learning_rate, run.blocks_per_step, seed=run.seed, updates_per_batch=updates)


def _size(scope: Scope | None, spec: ModelSpec) -> tuple[int, int]:
    """Trained parameters, and bytes by arithmetic."""
    if scope is None:
        return 0, 0
    n_parameters = sum(map(scope.parameters, spec.layers))
    return n_parameters, training_bytes(scope, spec).total


def _judge(
    student: Student, run: Run, tokens: Mapping[str, torch.Tensor], folder: Path
) -> tuple[float, float | None, float | None]:
    """Selection divergence, held-out perplexity and held-out divergence."""
    choice = AllExperts(student.spec.n_experts) if run.student == ALL_EXPERTS_ON else None
    selection, *heldout = (
        judge(student, tokens[name], LogProbReader(folder / name), _SCORED, choice=choice)
        for name in (["selection"] if run.is_sweep else ["selection", "heldout"])
    )
    if not heldout:
        return selection.divergence, None, None
    return selection.divergence, heldout[0].perplexity, heldout[0].divergence


def _settle() -> None:
    """One thread and the same bits again, as the stages do."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
