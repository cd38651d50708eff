"""``make bench``: what our streamed passes cost against a plain forward pass of stock transformers.

Both sides run the same tokens of the bundled model with the same threads and dtype, in turns, and the ratio is taken
pair by pair, so that a busy machine changes both. Writes ``benchmarks/results/speed.csv`` and ``speed.md``.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compressors.calibration import tokenize_heldout
from compressors.model.checkpoint import Checkpoint
from compressors.model.families import Role
from compressors.model.losses import kl_divergence_to_top
from compressors.model.streaming import StreamedModel, TokenGroup
from compressors.model.student import Student
from compressors.statistics import StatisticsCollector
from compressors.teacher import top_targets
from exporter.hub import bundled_text, resolve_model

_RESULTS = Path(__file__).parent / "results"
_BLOCKS = 16
_ROUNDS = 5


def main() -> None:
    """Measures, prints and writes the table."""
    source = resolve_model(None)
    tokens_BT = tokenize_heldout(bundled_text("heldout"), source)[1].spread(_BLOCKS).tokens_BT
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    student = Student.teacher(Checkpoint(source))

    @torch.no_grad()
    def plain_forward() -> None:
        for rows in tokens_BT.split(4):
            stock(rows)

    @torch.no_grad()
    def calibration() -> None:
        model = StreamedModel(student)
        collector = StatisticsCollector(model.shape)
        (hidden,) = model.stream([TokenGroup(tokens_BT, [collector.observe])])
        top_targets(model, hidden)

    rows = [
        ("calibration: statistics and targets, weights streamed", *_compare(calibration, plain_forward)),
        ("Router KD: one step, forward and backward", *_compare(_router_kd_step(student, tokens_BT), plain_forward)),
    ]
    _write(rows, tokens_BT.numel())


def _router_kd_step(student: Student, tokens_BT: torch.Tensor) -> Callable[[], None]:
    routers = {
        (Role.ROUTER, layer): nn.Parameter(student.tensor(Role.ROUTER, layer).float())
        for layer in range(student.shape.n_layers)
    }
    model = StreamedModel(student, trainable=routers, keep_layers=True)
    (hidden,) = model.stream([TokenGroup(tokens_BT)])
    targets = top_targets(model, hidden)
    log_probs, tokens = targets.log_probs_BTK.flatten(0, 1), targets.tokens_BTK.flatten(0, 1).long()

    def loss(positions: slice, logits: torch.Tensor) -> torch.Tensor:
        return kl_divergence_to_top(log_probs[positions], tokens[positions], logits).sum()

    def step() -> None:
        model.gradients(tokens_BT, loss)

    return step


def _compare(ours: Callable[[], None], peer: Callable[[], None]) -> tuple[float, float, float]:
    """Median seconds of ours and of the peer, and the median ratio, after one warm-up of each."""
    _seconds(ours)
    _seconds(peer)
    pairs = [(_seconds(ours), _seconds(peer)) for _ in range(_ROUNDS)]
    ratio = statistics.median(first / second for first, second in pairs)
    return statistics.median(first for first, _ in pairs), statistics.median(second for _, second in pairs), ratio


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _write(rows: list[tuple[str, float, float, float]], n_tokens: int) -> None:
    _RESULTS.mkdir(exist_ok=True)
    with (_RESULTS / "speed.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("what", "seconds", "stock_forward_seconds", "ratio"))
        writer.writerows((what, f"{ours:.3f}", f"{peer:.3f}", f"{ratio:.2f}") for what, ours, peer, ratio in rows)
    lines = [
        "# Speed against a plain forward pass",
        "",
        f"Bundled model, {n_tokens:,} tokens, float32, {torch.get_num_threads()} threads, median of {_ROUNDS} rounds.",
        "The peer is a forward pass of stock transformers with the whole model in memory. Written by `make bench`.",
        "",
        "| what | seconds | plain forward | ratio |",
        "|---|---|---|---|",
        *(f"| {what} | {ours:.2f} | {peer:.2f} | {ratio:.2f} |" for what, ours, peer, ratio in rows),
    ]
    (_RESULTS / "speed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
