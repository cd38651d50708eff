"""``make bench``: measures whether training routers after quantization helps. Writes ``quantized_recovery.{csv,md}``.

    python -m benchmarks.quantized_recovery [--threads 1]

The bundled model (32 experts, top-4) keeps 16 experts of each layer by REAP and is written in Q4_0 as GGUF and ONNX,
which then hold the same numbers. Router KD trains its routers before quantization, or after it, beside experts as the
files hold them. Students that are compared saw the same tokens; they are judged by the divergence from the teacher on
held-out text, inside each runtime. The same is measured with all 32 experts, where only quantization costs anything.
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

from compressors.calibration.splits import BLOCK_LENGTH, read_splits, tokenize
from compressors.calibration.statistics import LayerStatistics, StatisticsCollector, importance
from compressors.calibration.teacher import TeacherTargets, write_log_probs, write_targets
from compressors.model.description.roles import Role
from compressors.model.predictions.log_probs import LogProbReader, LogProbWriter
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import ExpertMap, Student
from compressors.recover.divergence import judge
from compressors.recover.objectives import Distillation
from compressors.recover.schedule import Schedule
from compressors.recover.training import Training, train
from compressors.shrink.prune import highest
from exporter.hub import bundled_text, resolve_model
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from exporter.writing.tuning import rewrite
from validate.metrics.evaluation import evaluate
from validate.runtimes.backend import RuntimeBackend, scored_positions
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend

_RESULTS = Path(__file__).parent / "results"
_CALIBRATION_BLOCKS, _SELECTION_BLOCKS, _CHUNKS = 80, 20, 32
_BLOCKS_PER_STEP = 2  # of Router KD
_TYPE = "Q4_0"
_RATE, _RATE_AGAIN = 3e-3, 1e-3  # of routers that were not taught yet, and of those that were
_RATES_OF_WHOLE = (3e-5, 1e-4, 3e-4)  # of routers that have lost no expert
_SCORED = scored_positions(BLOCK_LENGTH)
_RESAMPLES = 10_000

_COMPARED = (("before", "after"), ("before, twice", "before, then after"))


@dataclass(frozen=True)
class Measured:
    """The divergences of the quantized student with one arm's routers."""

    arm: str
    unquantized: float  # divergence on the selection split in torch, beside experts as they were, nats
    selection: float  # the same of the student as the files hold it
    heldout: Mapping[str, npt.NDArray[np.float64]]  # by runtime: mean divergence of each chunk, nats


class Bench:
    """The teacher's knowledge, gathered once.

    Args:
        folder: where it is kept.
        threads: threads of the writers and the runtimes.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.threads = threads
        self.source = open_source(resolve_model(None))
        splits = tokenize(
            read_splits(bundled_text("calibration"), bundled_text("heldout")), self.source.tokenizer_folder
        )
        counts = (_CALIBRATION_BLOCKS, _SELECTION_BLOCKS, _CHUNKS)
        self._texts = {
            name: split.spread(count).tokens_BT
            for name, split, count in zip(("calibration", "selection", "heldout"), splits, counts, strict=True)
        }
        self._limit = MemoryLimit(4_000_000_000, folder / "spill")
        self.statistics = self._run_teacher()

    def taught(self, student: Student, learning_rate: float) -> Student:
        """The student after one epoch of Router KD."""
        objective = Distillation(TeacherTargets(self.folder / "targets"), student)
        settings = Schedule(_CALIBRATION_BLOCKS, learning_rate, _BLOCKS_PER_STEP)
        training = Training(student, self._texts["calibration"], objective, settings, limit=self._limit)
        return train(training)

    def divergence(self, student: Student) -> float:
        """The student's divergence from the teacher on the selection split, in torch, nats."""
        known = LogProbReader(self.folder / "selection")
        return judge(student, self._texts["selection"], known, _SCORED, limit=self._limit).divergence

    def heldout(self, backend: RuntimeBackend) -> npt.NDArray[np.float64]:
        """Mean divergence of each held-out chunk in a runtime."""
        known = {"teacher": LogProbReader(self.folder / "heldout")}
        evaluation = evaluate(backend, self._texts["heldout"].numpy(), known)
        divergence_CT = evaluation.against["teacher"].kl_divergence_N.reshape(_CHUNKS, -1)
        means_C: npt.NDArray[np.float64] = divergence_CT.mean(axis=1, dtype=np.float64)
        return means_C

    def _run_teacher(self) -> list[LayerStatistics]:
        """Writes the teacher's targets and log-probabilities into the folder; returns its statistics by layer."""
        spec = self.source.spec
        teacher, collector = StreamedModel(Student.teacher(self.source), limit=self._limit), StatisticsCollector(spec)
        groups = [TokenGroup(self._texts["calibration"], [collector.observe])]
        groups += [TokenGroup(self._texts[name]) for name in ("selection", "heldout")]
        states = teacher.stream(groups)
        targets = TeacherTargets.create(self.folder / "targets", self._texts["calibration"].numel(), spec.vocab_size)
        write_targets(teacher, states[0], targets, range(_CALIBRATION_BLOCKS))
        for name, hidden in zip(("selection", "heldout"), states[1:], strict=True):
            n_blocks = len(self._texts[name])
            writer = LogProbWriter(self.folder / name, n_blocks * (_SCORED.stop - _SCORED.start), spec.vocab_size)
            write_log_probs(teacher, self._texts[name], hidden, _SCORED, writer, range(n_blocks))
        teacher.release()
        return [collector.take(layer) for layer in range(spec.n_layers)]


class Files:
    """A student with some experts of each layer, in both containers, whose routers change.

    Args:
        bench: the teacher's knowledge.
        n_experts: experts of each layer that stay: those of the highest REAP scores.
    """

    def __init__(self, bench: Bench, n_experts: int) -> None:
        self._bench = bench
        self._folder = bench.folder / f"{n_experts}-experts"
        self._folder.mkdir()
        kept = [highest(layer.reap_scores(), n_experts) for layer in bench.statistics]
        self.student = Student(bench.source, ExpertMap.keeping(bench.source.spec.n_experts, kept))
        weights, threads = importance(bench.statistics, self.student.experts, self.student.spec), bench.threads
        write_gguf(self.student, _TYPE, self._gguf, importance=weights, name="student", threads=threads)
        write_onnx(self.student, _TYPE, self._folder, importance=weights, threads=threads)

    @property
    def _gguf(self) -> Path:
        return self._folder / "student.gguf"

    def shipped(self, routers: Student) -> Student:
        """The student with the numbers of its files, and a student's routers."""
        return _with_routers(self.student.as_written(GgufWeights(self._gguf, self.student.spec)), routers)

    def measured(self, arm: str, routers: Student) -> Measured:
        """Puts a student's routers into both files and runs them."""
        for weights in (GgufWeights(self._gguf, self.student.spec), OnnxWeights(self._folder, self.student.spec)):
            rewrite(
                weights,
                {
                    self.student.spec.tensor(Role.ROUTER, layer).gguf.name.format(layer=layer): values
                    for layer, values in _routers(routers).items()
                },
            )
        threads = self._bench.threads
        backends = (LlamaCppBackend(self._gguf, threads=threads), OnnxRuntimeBackend(self._folder, threads=threads))
        result = Measured(
            arm,
            self._bench.divergence(_with_routers(self.student, routers)),
            self._bench.divergence(self.shipped(routers)),
            {backend.runtime: self._bench.heldout(backend) for backend in backends},
        )
        print(" | ".join(_row(result)), flush=True)
        return result


def _with_routers(student: Student, routers: Student) -> Student:
    return student.with_overlay(
        {student.name(Role.ROUTER, layer): router for layer, router in _routers(routers).items()}
    )


def _routers(student: Student) -> dict[int, torch.Tensor]:
    return {layer: student.tensor(Role.ROUTER, layer).float() for layer in range(student.spec.n_layers)}


def _pruned_arms(bench: Bench) -> list[Measured]:
    files = Files(bench, bench.source.spec.n_experts // 2)
    before = bench.taught(files.student, _RATE)
    return [
        files.measured("none", files.student),
        files.measured("before", before),
        files.measured("after", bench.taught(files.shipped(files.student), _RATE)),
        files.measured("before, twice", bench.taught(before, _RATE_AGAIN)),
        files.measured("before, then after", bench.taught(files.shipped(before), _RATE_AGAIN)),
    ]


def _whole_arms(bench: Bench) -> list[Measured]:
    files = Files(bench, bench.source.spec.n_experts)
    results = [files.measured("none", files.student)]
    for rate in _RATES_OF_WHOLE:
        taught = bench.taught(files.shipped(files.student), rate)
        results.append(files.measured(f"after, rate {rate:g}", taught))
    return results


def interval(differences_C: npt.NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean, by bootstrap over chunks: the tokens of a chunk are not independent."""
    random = np.random.default_rng(seed)
    picked = random.integers(len(differences_C), size=(_RESAMPLES, len(differences_C)))
    low, high = np.percentile(differences_C[picked].mean(axis=1), [2.5, 97.5]).tolist()
    return low, high


def write_csv(tables: Mapping[int, Sequence[Measured]], path: Path) -> None:
    """Writes a line for each arm; the keys of ``tables`` are the numbers of experts that are left."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["experts", "routers", "unquantized", "selection", *_runtimes(tables)])
        for n_experts, results in tables.items():
            writer.writerows([n_experts, *_row(result)] for result in results)


def write_markdown(tables: Mapping[int, Sequence[Measured]], path: Path) -> None:
    """Writes the arms and their comparisons, with intervals."""
    pruned, whole = tables
    lines = [
        "# Routers taught before and after quantization",
        "",
        f"The bundled model in {_TYPE}; Router KD with {_CALIBRATION_BLOCKS} blocks of {BLOCK_LENGTH} tokens each "
        f"time, {_BLOCKS_PER_STEP} in a step. Divergence from the teacher in nats: on the selection split in torch, "
        "beside experts as they were (*unquantized*) and as the files hold them, and on "
        f"{_CHUNKS} held-out chunks in each runtime. `make bench` writes this page.",
        "",
        f"## 32 experts pruned to {pruned} by REAP",
        "",
        *_table(tables[pruned], _runtimes(tables)),
        "",
        "Change by teaching after instead of before, with the same tokens (95 % interval, paired):",
        "",
        *_comparisons(tables[pruned], _COMPARED),
        "",
        f"## All {whole} experts",
        "",
        "What quantization costs is all that can be made good here.",
        "",
        *_table(tables[whole], _runtimes(tables)),
        "",
        *_comparisons(tables[whole], [(tables[whole][0].arm, taught.arm) for taught in tables[whole][1:]]),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _runtimes(tables: Mapping[int, Sequence[Measured]]) -> list[str]:
    return list(next(iter(tables.values()))[0].heldout)


def _row(result: Measured) -> list[str]:
    means = (chunks.mean() for chunks in result.heldout.values())
    # the original's own divergence is zero but for rounding
    return [result.arm, *(f"{max(0.0, value):.4f}" for value in (result.unquantized, result.selection, *means))]


def _table(results: Sequence[Measured], runtimes: Sequence[str]) -> list[str]:
    lines = [
        f"| routers taught | unquantized | selection | {' | '.join(runtimes)} |",
        f"|---|---|---|{'---|' * len(runtimes)}",
    ]
    return lines + [f"| {' | '.join(_row(result))} |" for result in results]


def _comparisons(results: Sequence[Measured], pairs: Sequence[tuple[str, str]]) -> list[str]:
    by_arm = {result.arm: result.heldout for result in results}
    return [
        _comparison(f"{other} against {one}, {runtime}", by_arm[one][runtime], by_arm[other][runtime])
        for one, other in pairs
        for runtime in by_arm[one]
    ]


def _comparison(what: str, one_C: npt.NDArray[np.float64], other_C: npt.NDArray[np.float64]) -> str:
    differences_C = other_C - one_C
    low, high = interval(differences_C)
    share = differences_C.mean() / one_C.mean()
    return f"- {what}: {differences_C.mean():+.4f} nats ({low:+.4f} to {high:+.4f}), {share:+.2%}"


def main() -> None:
    """Measures all arms."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as the stages do
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), threads)
        n_experts = bench.source.spec.n_experts
        tables = {n_experts // 2: _pruned_arms(bench), n_experts: _whole_arms(bench)}
    write_csv(tables, _RESULTS / "quantized_recovery.csv")
    write_markdown(tables, _RESULTS / "quantized_recovery.md")


if __name__ == "__main__":
    main()
