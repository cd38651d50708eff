"""``make bench``: the cost of calibration and of a step of Router KD, in plain forward passes of stock transformers.

    python -m benchmarks.speed [CHECKPOINT] [--tokens 65536] [--arithmetic bfloat16|float32]

The bundled model takes seconds; ``benchmarks.scale.checkpoints`` makes checkpoints of real shape.

The peer has the whole model in memory and its fastest experts implementation; both sides have the same dtype, threads
and tokens, and run in turns. Loading is excluded on both sides: our layers are in memory after the warm-up.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from compressors.calibration.statistics import StatisticsCollector
from compressors.calibration.teacher import TeacherTargets, write_targets
from compressors.model.running.arithmetic import dtype_of
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from compressors.recover.objectives import Distillation
from compressors.recover.schedule import Schedule
from compressors.recover.training import Training
from exporter.hub import resolve_model

_RESULTS = Path(__file__).parent / "results"
_BLOCK = 512
_STEP_BLOCKS = 8


def main() -> None:
    """Measures, prints and appends to ``benchmarks/results/speed.csv``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", nargs="?", type=resolve_model, default=resolve_model(None))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--arithmetic", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as the stages do
    tokens_BT = torch.randint(0, 4096, (arguments.tokens // _BLOCK, _BLOCK), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        sides = _Sides(arguments.checkpoint, tokens_BT, dtype_of(arguments.arithmetic), Path(folder))
        # the short ones first: they warm up both sides for the long ones
        sides.step()
        _measure("Router KD step", sides.step, sides.plain_forward_of_a_step, 2 * arguments.rounds, arguments)
        sides.calibrate(_STEP_BLOCKS)
        _measure("calibration", sides.calibrate, sides.plain_forward, arguments.rounds, arguments)


class _Sides:
    """Both sides, loaded."""

    def __init__(self, folder: Path, tokens_BT: torch.Tensor, dtype: torch.dtype, work: Path) -> None:
        self._tokens_BT = tokens_BT
        self._dtype = dtype
        self._student = Student.teacher(open_source(folder))
        limit = MemoryLimit(psutil.virtual_memory().available // 2, work / "spill")
        self._model = StreamedModel(self._student, limit=limit)
        self._targets = TeacherTargets.create(work / "targets", tokens_BT.numel(), self._model.spec.vocab_size)
        settings = Schedule(len(tokens_BT), 1e-5, _STEP_BLOCKS)
        objective = Distillation(self._targets, self._student)
        self._training = Training(self._student, tokens_BT, objective, settings, limit=limit, dtype=dtype)
        self._stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self._rows = self._choose_fastest()

    def calibrate(self, n_blocks: int | None = None) -> None:
        """Statistics of all layers, and the targets on disk, of all blocks or the first ones."""
        tokens_BT = self._tokens_BT[:n_blocks]
        collector = StatisticsCollector(self._model.spec)
        (hidden,) = self._model.stream([TokenGroup(tokens_BT, [collector.observe], self._dtype)])
        write_targets(self._model, hidden, self._targets, range(len(tokens_BT)))

    @torch.no_grad()
    def plain_forward(self) -> None:
        """Logits of all tokens."""
        for rows in self._tokens_BT.split(self._rows):
            self._stock(rows, use_cache=False)

    def step(self) -> None:
        """One optimizer step of 8 blocks."""
        self._training.step()

    @torch.no_grad()
    def plain_forward_of_a_step(self) -> None:
        """Logits of as many tokens."""
        for rows in self._tokens_BT[:_STEP_BLOCKS].split(self._rows):
            self._stock(rows, use_cache=False)

    def _choose_fastest(self) -> int:
        """Tries the peer's experts implementations and batch sizes on some tokens; returns the best batch size."""
        tried = {}
        for implementation in ("eager", "grouped_mm"):
            for rows in (2, 8):
                self._stock.set_experts_implementation(implementation)
                self._rows = rows
                self.plain_forward_of_a_step()
                tried[implementation, rows] = _seconds(self.plain_forward_of_a_step)
        implementation, rows = min(tried, key=lambda key: tried[key])
        print({f"{name}, {n} rows": f"{seconds:.2f} s" for (name, n), seconds in tried.items()})
        self._stock.set_experts_implementation(implementation)
        return rows


def _measure(what: str, ours: Callable[[], None], peer: Callable[[], None], rounds: int, arguments: Any) -> None:
    """Runs both in turns; prints and records the median seconds of each, and the median ratio."""
    pairs = [(_seconds(ours), _seconds(peer)) for _ in range(rounds)]
    ratio = median(first / second for first, second in pairs)
    _write(what, median(first for first, _ in pairs), median(second for _, second in pairs), ratio, arguments)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _write(what: str, ours: float, peer: float, ratio: float, arguments: Any) -> None:
    print(f"{what}: {ours:.2f} s, plain forward {peer:.2f} s, ratio {ratio:.2f}", flush=True)
    row = {
        "model": arguments.checkpoint.name,
        "what": what,
        "tokens": arguments.tokens,
        "arithmetic": arguments.arithmetic,
        "threads": torch.get_num_threads(),
        "seconds": f"{ours:.2f}",
        "stock_forward_seconds": f"{peer:.2f}",
        "ratio": f"{ratio:.2f}",
    }
    path = _RESULTS / "speed.csv"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
