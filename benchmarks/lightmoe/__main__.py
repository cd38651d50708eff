"""``make lightmoe``: writes ``benchmarks/results/lightmoe.{csv,md,png}``, an hour.

A run that was killed continues where it stopped: its results lie in ``--folder``, which a finished run removes.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click

from benchmarks.lightmoe.arms import ARMS, SHARES
from benchmarks.lightmoe.chart import write_chart
from benchmarks.lightmoe.measure import Measured, load, measure_into, prepare
from benchmarks.lightmoe.table import write_csv, write_markdown
from benchmarks.quality.measure import MODELS

_RESULTS = Path(__file__).parents[1] / "results"


@click.command()
@click.option(
    "--folder", default=Path(tempfile.gettempdir()) / "moe-export-lightmoe", type=Path, help="For what is measured."
)
@click.option("--only-tables", is_flag=True, help="Write the tables of the runs that are done, and do no other.")
def main(folder: Path, only_tables: bool) -> None:
    """Does every run, one after another."""
    results: list[Measured] = []
    for arm in ARMS.values():
        for share in sorted(arm.shares, reverse=True):
            for model in MODELS:
                found = folder / model / f"{arm.name} {share}.json"
                if not found.exists():
                    if only_tables:
                        continue
                    prepare(model, folder / model)
                    measure_into(found, model, arm.name, share, folder / model)
                results.append(load(found))
                result = results[-1]
                print(
                    f"{model}, {share:.0%}, {arm.name}: {result.removed:.1%} removed, divergence "
                    f"{result.divergence:.4f}, perplexity {result.perplexity:.2f}, {result.seconds:.0f} s",
                    flush=True,
                )
    write_csv(results, _RESULTS / "lightmoe.csv")
    write_markdown(results, _RESULTS / "lightmoe.md", SHARES)
    write_chart(results, _RESULTS / "lightmoe.png", SHARES)
    if not only_tables:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
