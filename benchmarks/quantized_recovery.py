"""``make bench``: is it worth teaching routers after quantization? Writes ``quantized_recovery.{csv,md}``.

    python -m benchmarks.quantized_recovery [--threads 1]

The bundled model (32 experts, top-4) keeps 16 experts of each layer by REAP and is written in Q4_0 as GGUF and ONNX,
which then hold the same numbers. Router KD teaches its routers before quantization, or after it, beside experts as the
files hold them. What is compared saw the same tokens; it is judged by the divergence from the teacher on held-out text,
inside each runtime.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from compressors.calibration import BLOCK_LENGTH, read_splits, tokenize
from compressors.model.checkpoint import Checkpoint
from compressors.model.families import Role
from compressors.model.gguf_weights import GgufWeights
from compressors.model.log_probs import LogProbReader, LogProbWriter
from compressors.model.memory import MemoryLimit
from compressors.model.onnx_weights import OnnxWeights
from compressors.model.streaming import StreamedModel, TokenGroup
from compressors.model.student import ExpertMap, Student
from compressors.prune import highest
from compressors.recover.divergence import judge
from compressors.recover.objectives import Distillation
from compressors.recover.schedule import Schedule
from compressors.recover.training import Training, train
from compressors.statistics import LayerStatistics, StatisticsCollector, importance
from compressors.teacher import TeacherTargets, write_log_probs, write_targets
from exporter.gguf.writer import write_gguf
from exporter.hub import bundled_text, resolve_model
from exporter.onnx.writer import write_onnx
from exporter.routers import rewrite_routers
from validate.backend import scored_positions
from validate.evaluation import evaluate
from validate.llama_cpp import LlamaCppBackend
from validate.onnx_runtime import OnnxRuntimeBackend

_RESULTS = Path(__file__).parent / "results"
_CALIBRATION_BLOCKS, _SELECTION_BLOCKS, _CHUNKS = 80, 20, 32  # the first are 10 steps of Router KD
_TYPE = "Q4_0"
_RATE, _RATE_AGAIN = 3e-3, 1e-3  # of routers that were not taught yet, and of those that were
_SCORED = scored_positions(BLOCK_LENGTH)
_RESAMPLES = 10_000

_COMPARED = (("before", "after"), ("before, twice", "before, then after"))


@dataclass(frozen=True)
class Measured:
    """What routers are worth in the quantized student."""

    arm: str
    selection: float  # divergence in torch, of the student as the files hold it, nats
    heldout: Mapping[str, npt.NDArray[np.float64]]  # by runtime: mean divergence of each chunk, nats


class Bench:
    """The teacher's knowledge, gathered once, and files whose routers change.

    Args:
        folder: for all of it.
        threads: of torch and of the runtimes.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = folder
        self._threads = threads
        source = Checkpoint(resolve_model(None))
        splits = tokenize(read_splits(bundled_text("calibration"), bundled_text("heldout")), source.folder)
        counts = (_CALIBRATION_BLOCKS, _SELECTION_BLOCKS, _CHUNKS)
        self._texts = {
            name: split.spread(count).tokens_BT
            for name, split, count in zip(("calibration", "selection", "heldout"), splits, counts, strict=True)
        }
        self._limit = MemoryLimit(4_000_000_000, folder / "spill")
        statistics = self._run_teacher(source)
        kept = [highest(layer.reap_scores(), source.shape.n_experts // 2) for layer in statistics]
        self.pruned = Student(source, ExpertMap.keeping(source.shape.n_experts, kept))
        weights = importance(statistics, self.pruned.experts)
        write_gguf(self.pruned, _TYPE, self._gguf, importance=weights, name="student", threads=threads)
        write_onnx(self.pruned, _TYPE, folder, importance=weights, context_length=BLOCK_LENGTH, threads=threads)

    @property
    def _gguf(self) -> Path:
        return self._folder / "student.gguf"

    def shipped(self, routers: Student) -> Student:
        """The pruned student with the numbers of its files, and a student's routers."""
        written = self.pruned.as_written(GgufWeights(self._gguf, self.pruned.shape))
        tensors = {written.name(Role.ROUTER, layer): router for layer, router in _routers(routers).items()}
        return written.with_overlay(tensors)

    def taught(self, student: Student, learning_rate: float) -> Student:
        """One epoch of Router KD."""
        targets = TeacherTargets(self._folder / "targets")
        settings = Schedule(_CALIBRATION_BLOCKS, learning_rate)
        objective = Distillation(targets, student)
        training = Training(student, self._texts["calibration"], objective, settings, limit=self._limit)
        return train(training)

    def measured(self, arm: str, student: Student) -> Measured:
        """Puts a student's routers into both files and runs them."""
        for weights in (GgufWeights(self._gguf, self.pruned.shape), OnnxWeights(self._folder, self.pruned.shape)):
            rewrite_routers(weights, _routers(student))
        known = {name: LogProbReader(self._folder / name) for name in ("selection", "heldout")}
        judgement = judge(
            self.shipped(student), self._texts["selection"], known["selection"], _SCORED, limit=self._limit
        )
        heldout = {}
        for backend in (
            LlamaCppBackend(self._gguf, threads=self._threads),
            OnnxRuntimeBackend(self._folder, threads=self._threads),
        ):
            evaluation = evaluate(backend, self._texts["heldout"].numpy(), {"teacher": known["heldout"]})
            chunks = evaluation.against["teacher"].kl_divergence_N.astype(np.float64).reshape(_CHUNKS, -1)
            heldout[backend.runtime] = chunks.mean(axis=1)
        means = ", ".join(f"{runtime} {chunks.mean():.4f}" for runtime, chunks in heldout.items())
        print(f"{arm}: selection {judgement.divergence:.4f}, {means}", flush=True)
        return Measured(arm, judgement.divergence, heldout)

    def _run_teacher(self, source: Checkpoint) -> list[LayerStatistics]:
        """Leaves its targets and log-probabilities in the folder."""
        teacher, collector = (
            StreamedModel(Student.teacher(source), limit=self._limit),
            StatisticsCollector(source.shape),
        )
        groups = [TokenGroup(self._texts["calibration"], [collector.observe])]
        groups += [TokenGroup(self._texts[name]) for name in ("selection", "heldout")]
        states = teacher.stream(groups)
        vocab_size = source.shape.vocab_size
        targets = TeacherTargets.create(self._folder / "targets", self._texts["calibration"].numel(), vocab_size)
        write_targets(teacher, states[0], targets, range(_CALIBRATION_BLOCKS))
        for name, hidden in zip(("selection", "heldout"), states[1:], strict=True):
            n_blocks = len(self._texts[name])
            writer = LogProbWriter(self._folder / name, n_blocks * (_SCORED.stop - _SCORED.start), vocab_size)
            write_log_probs(teacher, self._texts[name], hidden, _SCORED, writer, range(n_blocks))
        teacher.release()
        return [collector.take(layer) for layer in range(source.shape.n_layers)]


def _routers(student: Student) -> dict[int, torch.Tensor]:
    return {layer: student.tensor(Role.ROUTER, layer).float() for layer in range(student.shape.n_layers)}


def _run_arms(bench: Bench) -> list[Measured]:
    before = bench.taught(bench.pruned, _RATE)
    return [
        bench.measured("none", bench.pruned),
        bench.measured("before", before),
        bench.measured("after", bench.taught(bench.shipped(bench.pruned), _RATE)),
        bench.measured("before, twice", bench.taught(before, _RATE_AGAIN)),
        bench.measured("before, then after", bench.taught(bench.shipped(before), _RATE_AGAIN)),
    ]


def interval(differences_C: npt.NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean, by bootstrap over chunks: the tokens of a chunk are not independent."""
    random = np.random.default_rng(seed)
    picked = random.integers(len(differences_C), size=(_RESAMPLES, len(differences_C)))
    low, high = np.percentile(differences_C[picked].mean(axis=1), [2.5, 97.5]).tolist()
    return low, high


def write_csv(results: Sequence[Measured], path: Path) -> None:
    """A line for each arm."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["routers", "selection", *results[0].heldout])
        for result in results:
            means = (chunks.mean() for chunks in result.heldout.values())
            writer.writerow([result.arm, *(f"{value:.4f}" for value in (result.selection, *means))])


def write_markdown(results: Sequence[Measured], path: Path) -> None:
    """The arms, and what is compared, with intervals."""
    runtimes, by_arm = list(results[0].heldout), {result.arm: result for result in results}
    lines = [
        "# Routers taught before and after quantization",
        "",
        f"The bundled model, 32 experts pruned to 16 by REAP, {_TYPE}; Router KD with {_CALIBRATION_BLOCKS} blocks of "
        f"{BLOCK_LENGTH} tokens each time. Divergence from the teacher in nats: on the selection split in torch, with "
        f"the numbers that the files hold, and on {_CHUNKS} held-out chunks in each runtime. `make bench` writes this "
        "page.",
        "",
        f"| routers taught | selection | {' | '.join(runtimes)} |",
        f"|---|---|{'---|' * len(runtimes)}",
    ]
    for result in results:
        values = [result.selection, *(result.heldout[runtime].mean() for runtime in runtimes)]
        lines.append(f"| {result.arm} | {' | '.join(f'{value:.4f}' for value in values)} |")
    lines += ["", "Change by teaching after instead of before, with the same tokens (95 % interval, paired):", ""]
    for before, after in _COMPARED:
        for runtime in runtimes:
            differences_C = by_arm[after].heldout[runtime] - by_arm[before].heldout[runtime]
            low, high = interval(differences_C)
            share = differences_C.mean() / by_arm[before].heldout[runtime].mean()
            lines.append(
                f"- {after} against {before}, {runtime}: {differences_C.mean():+.4f} nats ({low:+.4f} to {high:+.4f}), "
                f"{share:+.2%}"
            )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measures all arms."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as the stages do
    with tempfile.TemporaryDirectory() as folder:
        results = _run_arms(Bench(Path(folder), threads))
    write_csv(results, _RESULTS / "quantized_recovery.csv")
    write_markdown(results, _RESULTS / "quantized_recovery.md")


if __name__ == "__main__":
    main()
