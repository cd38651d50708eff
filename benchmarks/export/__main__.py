"""``make bench-export``: our GGUF export against llama.cpp's converter followed by its quantizer.

Same checkpoint (OLMoE's shape, random weights, source in the page cache), importance matrix, types and threads; in
turns, each in processes of its own. Then the tensors of both files are compared byte by byte. Writes
``benchmarks/results/export.csv`` and ``export.md``.
"""

from __future__ import annotations

import csv
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import click

from benchmarks.export import ours
from benchmarks.export.importance import write_imatrix, write_statistics
from benchmarks.export.llama_cpp import Tools, build_tools
from benchmarks.export.tensors import equal_tensors
from benchmarks.scale.checkpoints import MODELS, with_layers, write_checkpoint
from compressors.model.config.reading import read_spec

_REPOSITORY = Path(__file__).parents[2]
_RESULTS = _REPOSITORY / "benchmarks" / "results"
_TARGETS = {"Q8_0": (0.6, 0.36), "Q4_K_M": (1.0, 0.25)}
"""At most this share of their time, and of the bytes that they write."""


@dataclass(frozen=True)
class Cost:
    """The total cost of some processes."""

    seconds: float
    cpu_seconds: float
    written: int  # bytes that went from memory to the disk, or will

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)))


@dataclass(frozen=True)
class Comparison:
    """Medians over the rounds; the shares are taken round by round."""

    preset: str
    ours: Cost
    converter: Cost
    quantizer: Cost
    time_share: float
    written_share: float
    tensors_equal: int
    tensors: int


@click.command()
@click.option("--layers", default=4, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--tools", default=_REPOSITORY / ".venv-llama", type=Path, help="Where llama-quantize is built.")
@click.option("--folder", default=Path(tempfile.gettempdir()) / "moe-export-bench", type=Path, help="For the models.")
def main(layers: int, rounds: int, threads: int, tools: Path, folder: Path) -> None:
    """Measures, prints and writes the tables."""
    llama_cpp = build_tools(tools)
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"olmoe-{layers}-layers"
    if not source.exists():
        write_checkpoint(with_layers(MODELS["olmoe"], layers), source)
    spec = read_spec(source)
    write_statistics(spec, folder / "statistics")
    write_imatrix(spec, folder / "statistics", folder / "imatrix.gguf")
    comparisons = []
    for preset in _TARGETS:
        comparisons.append(_compare(preset, source, folder, llama_cpp, rounds, threads))
        print(comparisons[-1])
    for leftover in folder.glob("*.gguf"):
        leftover.unlink()
    _write(comparisons, layers, rounds, threads)


def _compare(preset: str, source: Path, folder: Path, tools: Tools, rounds: int, threads: int) -> Comparison:
    our_file, their_file, converted = folder / "ours.gguf", folder / "theirs.gguf", folder / "converted.gguf"
    our_command: list[str | Path] = [sys.executable, "-m", ours.__name__]
    our_command += [source, folder / "statistics", preset, our_file, str(threads)]
    convert: list[str | Path] = [*tools.convert, source, "--outfile", converted, "--outtype", "bf16"]
    quantize: list[str | Path] = [*tools.quantize, "--imatrix", folder / "imatrix.gguf"]
    quantize += [converted, their_file, preset, str(threads)]
    measured: list[tuple[Cost, Cost, Cost]] = []
    for _ in range(rounds):
        for path in (our_file, their_file, converted):
            path.unlink(missing_ok=True)
        _read_into_page_cache(source)
        first, second = _cost(convert, threads), _cost(quantize, threads)
        _read_into_page_cache(source)
        measured.append((_cost(our_command, threads), first, second))
    equal, total = equal_tensors(our_file, their_file)
    return Comparison(
        preset,
        ours=_median([we for we, _, _ in measured]),
        converter=_median([first for _, first, _ in measured]),
        quantizer=_median([second for _, _, second in measured]),
        time_share=statistics.median(we.seconds / (first + second).seconds for we, first, second in measured),
        written_share=statistics.median(we.written / (first + second).written for we, first, second in measured),
        tensors_equal=equal,
        tensors=total,
    )


def _read_into_page_cache(source: Path) -> None:
    """Reads the checkpoint once, with nothing left to be written behind it."""
    os.sync()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _cost(command: Sequence[str | Path], threads: int) -> Cost:
    """Runs a command; the kernel counts a finished child's time and bytes as its parent's."""
    before, usage, start = _bytes_written(), resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=_REPOSITORY)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - usage.ru_utime - usage.ru_stime
    return Cost(seconds, cpu, _bytes_written() - before)


def _bytes_written() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


def _median(costs: Sequence[Cost]) -> Cost:
    ordered = sorted(costs, key=lambda cost: cost.seconds)
    return ordered[len(ordered) // 2]


def _write(comparisons: Sequence[Comparison], layers: int, rounds: int, threads: int) -> None:
    _RESULTS.mkdir(exist_ok=True)
    rows = [_row(comparison) for comparison in comparisons]
    with (_RESULTS / "export.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        "# GGUF export against llama.cpp's converter and quantizer",
        "",
        f"OLMoE's shape with {layers} layers and random weights, {threads} threads, source in the page cache, the same",
        f"importance matrix and types; medians of {rounds} rounds in turns. Theirs is `convert_hf_to_gguf.py` to BF16,",
        "then `llama-quantize`, compiled from the sources of the llama-cpp-python that we use. Our time includes that",
        "the file is on the disk in the end; theirs ends with what is still to be flushed. Written by",
        "`make bench-export`.",
        "",
        "| type | ours | theirs | share | CPU, ours | theirs | written, ours | theirs | share | equal tensors |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for comparison in comparisons:
        we, they = comparison.ours, comparison.converter + comparison.quantizer
        time_target, written_target = _TARGETS[comparison.preset]
        lines.append(
            f"| {comparison.preset} | {we.seconds:.1f} s | {they.seconds:.1f} s "
            f"({comparison.converter.seconds:.1f} + {comparison.quantizer.seconds:.1f}) "
            f"| {comparison.time_share:.2f} (target {time_target}) | {we.cpu_seconds:.1f} s | {they.cpu_seconds:.1f} s "
            f"| {we.written / 1e9:.2f} GB | {they.written / 1e9:.2f} GB "
            f"| {comparison.written_share:.3f} (target {written_target}) "
            f"| {comparison.tensors_equal} of {comparison.tensors} |"
        )
    (_RESULTS / "export.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _row(comparison: Comparison) -> Mapping[str, object]:
    row: dict[str, object] = {"type": comparison.preset}
    for side in ("ours", "converter", "quantizer"):
        cost: Cost = getattr(comparison, side)
        row |= {
            f"{side}_seconds": f"{cost.seconds:.2f}",
            f"{side}_cpu_seconds": f"{cost.cpu_seconds:.2f}",
            f"{side}_written_bytes": cost.written,
        }
    row |= {
        "time_share": f"{comparison.time_share:.3f}",
        "written_share": f"{comparison.written_share:.4f}",
        "tensors_equal": comparison.tensors_equal,
        "tensors": comparison.tensors,
    }
    return row


if __name__ == "__main__":
    main()
