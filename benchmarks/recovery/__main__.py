"""``make bench``, second part: trains compressed models in every way; writes ``benchmarks/results/recovery.*``.

It takes hours. A run that was killed continues where it stopped: its results lie in ``--folder``, which a finished run
removes.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import click

from benchmarks.recovery.chart import write_comparison, write_ladder
from benchmarks.recovery.measure import Measured, load, measure_into, prepare
from benchmarks.recovery.runs import KINDS, MODELS, Run, all_runs
from benchmarks.recovery.table import short, write_csv, write_markdown

_RESULTS = Path(__file__).parents[1] / "results"
_FOUND = "found"
_LOADED_BEFORE = [
    "benchmarks.recovery.measure",
    "transformers.models.auto.modeling_auto",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
]


@click.command()
@click.option("--jobs", default=1, show_default=True, help="Runs that are done at a time, one thread each.")
@click.option(
    "--folder", default=Path(tempfile.gettempdir()) / "moe-export-recovery", type=Path, help="For what is measured."
)
@click.option("--only-tables", is_flag=True, help="Write the tables of the runs that are done, and do no other.")
def main(jobs: int, folder: Path, only_tables: bool) -> None:
    """Does every run in a process of its own."""
    if only_tables:
        _write(
            [load(folder / _FOUND / run.file_name) for run in all_runs() if (folder / _FOUND / run.file_name).exists()]
        )
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    # runs are forked from a process that has done nothing but load the libraries
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED_BEFORE)
    with ThreadPoolExecutor(jobs) as threads:
        list(threads.map(lambda model: _in_own_process(context, prepare, model, folder / model), MODELS))
        _write(list(threads.map(lambda run: _measured(context, folder, run), all_runs())))
    shutil.rmtree(folder)


def _write(results: Sequence[Measured]) -> None:
    write_csv(results, _RESULTS / "recovery.csv")
    write_markdown(results, _RESULTS / "recovery.md")
    write_ladder(results, _RESULTS / "recovery.png")
    if any(short(results, model, student) for model in MODELS for student in KINDS):
        write_comparison(results, _RESULTS / "recovery_fine_coarse.png")


def _measured(context: ForkServerContext, folder: Path, run: Run) -> Measured:
    found = folder / _FOUND / run.file_name
    if not found.exists():
        found.parent.mkdir(exist_ok=True)
        _in_own_process(context, measure_into, found, run, folder / run.model)
    result = load(found)
    print(_line(result), flush=True)
    return result


def _in_own_process(context: ForkServerContext, work: Callable[..., None], *arguments: Any) -> None:
    process = context.Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        sys.exit(f"{work.__name__} of {', '.join(map(str, arguments))}: the process ended with {process.exitcode}")


def _line(result: Measured) -> str:
    run = result.run
    figures = "diverged" if result.selection is None else f"selection {result.selection:.4f}"
    if result.divergence is not None:
        figures += f", held-out {result.divergence:.4f}, perplexity {result.perplexity:.2f}"
    what = (
        f"{run.model} {run.student}, {run.arm}, {run.learning_rate:g}, {run.blocks_per_step} of {run.n_blocks} blocks"
    )
    return f"{what}, seed {run.seed}: {figures}, {result.seconds:.0f} s"


if __name__ == "__main__":
    main()
