"""``make quality``: every method on both trained models; writes ``benchmarks/results/quality.{csv,md,png}``.

A run that was killed continues where it stopped: its results lie in ``--folder``, which a finished run removes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path

import click

from benchmarks.quality.chart import write_chart
from benchmarks.quality.measure import MODELS, Measured, measure_into, prepare
from benchmarks.quality.methods import ARMS
from benchmarks.quality.table import write_csv, write_markdown

_RESULTS = Path(__file__).parents[1] / "results"
_LOADED_BEFORE = [
    "benchmarks.quality.measure",
    "transformers.models.auto.modeling_auto",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
]


@click.command()
@click.option("--jobs", default=1, show_default=True, help="Rows that are measured at a time, one thread each.")
@click.option(
    "--folder", default=Path(tempfile.gettempdir()) / "moe-export-quality", type=Path, help="For what is measured."
)
def main(jobs: int, folder: Path) -> None:
    """Measure every row in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # rows are forked from a process that has done nothing but load the libraries, which takes longer than most rows
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED_BEFORE)
    rows = [(model, arm.name, share) for model in MODELS for arm in ARMS.values() for share in arm.shares]
    for model in MODELS:
        prepare(model, folder / model)
    with ThreadPoolExecutor(jobs) as threads:
        results = list(threads.map(partial(_measured, context, folder), rows))
    write_csv(results, _RESULTS / "quality.csv")
    write_markdown(results, _RESULTS / "quality.md")
    write_chart(results, _RESULTS / "quality.png")
    shutil.rmtree(folder)


def _measured(context: ForkServerContext, folder: Path, row: tuple[str, str, float]) -> Measured:
    """Runs one row in a process that ends with it, unless its result is there."""
    model, method, share = row
    found = folder / model / f"{method.replace(' ', '-').replace(':', '-')}-{share}.json"
    if not found.exists():
        process = context.Process(target=measure_into, args=(found, model, method, share, folder / model))
        process.start()
        process.join()
        if process.exitcode != 0:
            sys.exit(f"{model}, {method}, {share:.0%}: the process ended with {process.exitcode}")
    values = json.loads(found.read_text(encoding="utf-8"))
    result = Measured(**values | {"chunk_divergences": tuple(values["chunk_divergences"])})
    print(_line(result), flush=True)
    return result


def _line(result: Measured) -> str:
    figures = result.setting if result.divergence is None else f"perplexity {result.perplexity:.2f}"
    figures += "" if result.divergence is None else f", divergence {result.divergence:.4f}, {result.seconds:.1f} s"
    return f"{result.model}, {result.method}, {result.share:.0%}: {figures}"


if __name__ == "__main__":
    main()
