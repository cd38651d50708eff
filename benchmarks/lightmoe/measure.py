"""Measures one arm: the teacher's results are computed once for each model and kept in a folder."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.lightmoe.arms import ARMS, removed
from benchmarks.quality.measure import MODELS
from benchmarks.quality.methods import TEACHER, Teacher
from compressors.calibration.splits import BLOCK_LENGTH, read_splits, tokenize
from compressors.calibration.statistics import StatisticsCollector, StoredStatistics, save_statistics
from compressors.calibration.teacher import TeacherTargets, write_targets
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from compressors.recover.objectives import Distillation
from compressors.recover.schedule import Schedule
from compressors.recover.training import Training, train
from exporter.writing.files import write_atomically
from validate.metrics.evaluation import evaluate
from validate.metrics.statistics import perplexity
from validate.runtimes.backend import scored_positions
from validate.runtimes.torch import TorchBackend

__all__ = ["BLOCKS_PER_STEP", "HELDOUT_CHUNKS", "TRAINING_BLOCKS", "Measured", "built", "load", "measure_into"]
__all__ += ["prepare"]

_TEXT = Path(__file__).parents[2] / "exporter/demo/text"
CALIBRATION_BLOCKS = 64
TRAINING_BLOCKS = 32
"""Blocks of 512 tokens, 16,384 in all, of the text of the statistics: the budget of every training."""

BLOCKS_PER_STEP = 1
HELDOUT_CHUNKS = 20
_MEMORY_BYTES = 4_000_000_000  # room enough for everything to stay
_TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class Measured:
    """One arm on one model at one share."""

    model: str
    arm: str
    share: float  # of the expert bytes that should go
    removed: float  # the share of the experts' values that is gone, as counted
    perplexity: float
    divergence: float  # mean over all scored positions of held-out text, nats
    seconds: float  # processor time of the training
    chunk_divergences: tuple[float, ...]


def prepare(model: str, folder: Path, n_chunks: int = HELDOUT_CHUNKS) -> None:
    """Puts what the teacher knows and, last, the tokens into the folder; ``n_chunks`` are held out."""
    if (folder / _TOKENS).exists():
        return
    _settle()
    source = open_source(MODELS[model])
    calibration, _, heldout = tokenize(read_splits(_TEXT / "calibration", _TEXT / "heldout"), source.tokenizer_folder)
    spread_BT = calibration.spread(CALIBRATION_BLOCKS).tokens_BT
    training_BT = spread_BT[torch.randperm(len(spread_BT), generator=torch.Generator().manual_seed(0))]
    heldout_BT = heldout.spread(n_chunks).tokens_BT
    student = Student.teacher(source)
    collector, teacher = StatisticsCollector(source.spec), StreamedModel(student)
    (states,) = teacher.stream([TokenGroup(training_BT, [collector.observe])])
    for layer in range(source.spec.n_layers):
        save_statistics(collector.take(layer), folder / "statistics", layer)
    targets = TeacherTargets.create(folder / "targets", training_BT.numel(), source.spec.vocab_size)
    write_targets(teacher, states, targets, range(len(training_BT)))
    scored = scored_positions(BLOCK_LENGTH)
    n_positions = n_chunks * (scored.stop - scored.start)
    writer = LogProbWriter(folder / "log_probs", n_positions, source.spec.vocab_size)
    evaluate(TorchBackend(student), heldout_BT.numpy(), {}, record=writer)
    save_file({"training": training_BT, "heldout": heldout_BT}, folder / _TOKENS)


def measure(model: str, name: str, share: float, folder: Path) -> Measured:
    """Builds, trains and measures an arm, on what :func:`prepare` left."""
    student, seconds = built(model, name, share, folder)
    gone, tokens = removed(student), load_file(folder / _TOKENS)
    evaluation = evaluate(
        TorchBackend(student), tokens["heldout"].numpy(), {TEACHER: LogProbReader(folder / "log_probs")}
    )
    divergence_N = evaluation.against[TEACHER].kl_divergence_N.astype("float64")
    return Measured(
        model,
        name,
        share,
        gone,
        perplexity(evaluation.negative_log_likelihood_N)[0],
        float(divergence_N.mean()),
        seconds,
        tuple(divergence_N.reshape(len(tokens["heldout"]), -1).mean(1).tolist()),
    )


def built(model: str, name: str, share: float, folder: Path) -> tuple[Student, float]:
    """An arm's student, trained as the arm says, and the processor time of the training."""
    _settle()
    source, tokens, arm = open_source(MODELS[model]), load_file(folder / _TOKENS), ARMS[name]
    statistics = StoredStatistics(folder / "statistics", source.spec.n_layers)
    student = arm.build(Teacher(source, statistics, tokens["training"]), share)
    if arm.scope is None:
        return student, 0.0
    start, objective = time.process_time(), Distillation(TeacherTargets(folder / "targets"), student)
    schedule = Schedule(TRAINING_BLOCKS, arm.rate, BLOCKS_PER_STEP, fade_ratio=arm.fade)
    limit = MemoryLimit(_MEMORY_BYTES, folder)
    student = train(Training(student, tokens["training"], objective, schedule, scope=arm.scope, limit=limit))
    return student, time.process_time() - start


def measure_into(path: Path, model: str, arm: str, share: float, folder: Path) -> None:
    """:func:`measure` with its result in a JSON file, which is complete or absent."""
    write_atomically(path, json.dumps(asdict(measure(model, arm, share, folder))))


def load(path: Path) -> Measured:
    """Reads what :func:`measure_into` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return Measured(**values | {"chunk_divergences": tuple(values["chunk_divergences"])})


def _settle() -> None:
    """One thread and the same bits again, as the stages do."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
