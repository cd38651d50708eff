"""Measures one arm on one model: the teacher's results are computed once and kept in a folder."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality.methods import ARMS, TEACHER, Teacher
from compressors.calibration.splits import BLOCK_LENGTH, read_splits, tokenize
from compressors.calibration.statistics import StatisticsCollector, StoredStatistics, save_statistics
from compressors.model.errors import InputError
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.files import write_atomically
from validate.metrics.evaluation import evaluate
from validate.metrics.statistics import perplexity
from validate.runtimes.backend import scored_positions
from validate.runtimes.torch import TorchBackend

__all__ = ["CALIBRATION_BLOCKS", "HELDOUT_CHUNKS", "MODELS", "Measured", "measure", "measure_into", "prepare"]

_REPOSITORY = Path(__file__).parents[2]
_TEXT = _REPOSITORY / "exporter/demo/text"

MODELS: Mapping[str, Path] = {
    "fine": _REPOSITORY / "exporter/demo/model",
    "coarse": _REPOSITORY / "tests/fixtures/coarse",
}
CALIBRATION_BLOCKS = 64
HELDOUT_CHUNKS = 30

_TOKENS = "tokens.safetensors"
_SCORED = scored_positions(BLOCK_LENGTH)


@dataclass(frozen=True)
class Measured:
    """One arm on one model at one share."""

    model: str
    method: str
    kind: str
    share: float  # of the expert parameters that should go
    removed: float | None  # the share that is gone; None, here and below: the method refused
    setting: str
    smaller_files: str
    perplexity: float | None
    divergence: float | None  # mean over all scored positions, nats
    seconds: float | None
    peak_bytes: int | None
    chunk_divergences: tuple[float, ...]


def prepare(model: str, folder: Path) -> None:
    """Puts the teacher's statistics, its held-out log-probabilities and, last, the tokens into the folder."""
    if (folder / _TOKENS).exists():
        return
    torch.set_num_threads(1)
    source = open_source(MODELS[model])
    teacher = Student.teacher(source)
    calibration, _, heldout = tokenize(read_splits(_TEXT / "calibration", _TEXT / "heldout"), source.tokenizer_folder)
    calibration_BT, heldout_BT = (
        calibration.spread(CALIBRATION_BLOCKS).tokens_BT,
        heldout.spread(HELDOUT_CHUNKS).tokens_BT,
    )
    collector = StatisticsCollector(source.spec)
    StreamedModel(teacher).stream([TokenGroup(calibration_BT, [collector.observe])])
    for layer in range(source.spec.n_layers):
        save_statistics(collector.take(layer), folder / "statistics", layer)
    n_positions = HELDOUT_CHUNKS * (_SCORED.stop - _SCORED.start)
    writer = LogProbWriter(folder / "log_probs", n_positions, source.spec.vocab_size)
    evaluate(TorchBackend(teacher), heldout_BT.numpy(), {}, record=writer)
    save_file({"calibration": calibration_BT, "heldout": heldout_BT}, folder / _TOKENS)


def measure(model: str, method: str, share: float, folder: Path) -> Measured:
    """Runs an arm on what :func:`prepare` left, in a process of its own: its peak memory is the process's so far."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as the stages do
    source, tokens, arm = open_source(MODELS[model]), load_file(folder / _TOKENS), ARMS[method]
    teacher = Teacher(source, StoredStatistics(folder / "statistics", source.spec.n_layers), tokens["calibration"])
    start = time.process_time()
    try:
        shrunk = arm.build(teacher, share)
    except InputError as error:
        return Measured(model, method, arm.kind, share, None, f"refused: {error}", "", None, None, None, None, ())
    seconds = time.process_time() - start
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    reference = LogProbReader(folder / "log_probs")
    evaluation = evaluate(TorchBackend(shrunk.student), tokens["heldout"].numpy(), {TEACHER: reference})
    divergence_N = evaluation.against[TEACHER].kl_divergence_N.astype("float64")
    return Measured(
        model,
        method,
        arm.kind,
        share,
        shrunk.removed,
        shrunk.setting,
        shrunk.smaller,
        perplexity(evaluation.negative_log_likelihood_N)[0],
        float(divergence_N.mean()),
        seconds,
        peak_bytes,
        tuple(divergence_N.reshape(HELDOUT_CHUNKS, -1).mean(1).tolist()),
    )


def measure_into(path: Path, model: str, method: str, share: float, folder: Path) -> None:
    """:func:`measure` with its result in a JSON file, which is complete or absent."""
    write_atomically(path, json.dumps(asdict(measure(model, method, share, folder))))
