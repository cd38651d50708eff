"""Compares the cost of validation with llama-perplexity's: the same GGUF file of 1 GB, the same 50 chunks, in turns.

    python -m benchmarks.validation [--threads 2] [--rounds 3]

The file has OLMoE's shape, two layers deep, in Q8_0, with random weights: what is measured is time and memory. Both
read llama-perplexity's own logits file as reference, take weights as stored, and compute perplexity and all statistics
of divergence; ours also reads the routing of every token. Writes ``benchmarks/results/validation.{csv,md}``.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click

from benchmarks.export.llama_cpp import build_tools
from benchmarks.scale.checkpoints import MODELS, with_layers, write_checkpoint
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.hub import bundled_text
from exporter.writing.gguf.writer import write_gguf

_ROOT = Path(__file__).parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"
_SHAPE, _LAYERS, _TYPE = "olmoe", 2, "Q8_0"
_CHUNKS, _CHUNK_TOKENS = 50, 512
_ALLOWED_SECONDS, _ALLOWED_BYTES = 1.3, 500_000_000  # a ratio, and what we may need beside llama.cpp


@dataclass(frozen=True)
class Cost:
    """The cost of one process and those that it waited for."""

    program: str
    seconds: float
    peak_bytes: int


@click.command()
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(threads: int, rounds: int) -> None:
    """Measures, prints and writes the results."""
    perplexity = build_tools(_ROOT / ".venv-llama").perplexity
    with tempfile.TemporaryDirectory(prefix="moe-export-validation-") as name:
        folder = Path(name)
        model, base = _write_model(folder), folder / "base.kld"
        tool = [*perplexity, "-m", model, "-c", str(_CHUNK_TOKENS), "-t", str(threads), "--no-repack"]
        tool += ["--kl-divergence-base", base]
        subprocess.run([*tool, "-f", _write_text(folder), "--chunks", str(_CHUNKS)], check=True, capture_output=True)
        ours = [sys.executable, "-m", "exporter", "validate", model, "--reference-logits", base]
        ours += ["--threads", str(threads)]
        costs = []
        for _ in range(rounds):
            for program, command in {"llama-perplexity": [*tool, "--kl-divergence"], "moe-export": ours}.items():
                costs.append(_measure(program, command))
                print(costs[-1], flush=True)
        _write(costs, model.stat().st_size, threads)


def _write_model(folder: Path) -> Path:
    write_checkpoint(with_layers(MODELS[_SHAPE], _LAYERS), folder / "checkpoint")
    path = folder / "model.gguf"
    write_gguf(
        Student.teacher(open_source(folder / "checkpoint")), _TYPE, path, name=_SHAPE, threads=os.cpu_count() or 1
    )
    return path


def _write_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n\n".join(file.read_text("utf-8") for file in sorted(bundled_text("heldout").glob("*.txt"))))
    return path


def _measure(program: str, command: Sequence[str | Path]) -> Cost:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=_ROOT)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code != 0:
        raise SystemExit(f"{program} ended with {code}:\n{said}")
    return Cost(program, time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def _write(costs: Sequence[Cost], file_bytes: int, threads: int) -> None:
    with (_RESULTS / "validation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["program", "seconds", "peak_bytes"])
        writer.writeheader()
        writer.writerows(asdict(cost) for cost in costs)
    programs = ("llama-perplexity", "moe-export")
    theirs_s, ours_s = (median(cost.seconds for cost in costs if cost.program == name) for name in programs)
    theirs_b, ours_b = (max(cost.peak_bytes for cost in costs if cost.program == name) for name in programs)
    lines = [
        "# What validation costs",
        "",
        f"A GGUF file of {file_bytes / 1e9:.2f} GB ({_SHAPE}'s shape, {_LAYERS} layers, {_TYPE}), {_CHUNKS} chunks of "
        f"{_CHUNK_TOKENS} tokens, {threads} threads, the same logits file as reference; median seconds and largest "
        f"peak of {len(costs) // 2} runs each, in turns. `python -m benchmarks.validation` writes this page.",
        "",
        "| | seconds | peak memory, MB |",
        "|---|---|---|",
        f"| llama-perplexity --kl-divergence | {theirs_s:.1f} | {theirs_b / 1e6:.0f} |",
        f"| moe-export validate, routing included | {ours_s:.1f} | {ours_b / 1e6:.0f} |",
        "",
        f"Time: {ours_s / theirs_s:.2f} times the tool's (allowed: {_ALLOWED_SECONDS}). Memory: "
        f"{(ours_b - theirs_b) / 1e6:+.0f} MB beside it (allowed: +{_ALLOWED_BYTES / 1e6:.0f}).",
    ]
    (_RESULTS / "validation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
