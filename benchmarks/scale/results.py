"""Keeps measured runs in ``benchmarks/results/scale.csv`` and shows them in ``scale.md``."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from exporter.estimating.sizes import parse_size

__all__ = ["record"]

_RESULTS = Path(__file__).parent.parent / "results"

_EXPLANATION = """\
# What each stage costs

Checkpoints of real shape with random weights; a quarter of the experts is dropped. Peak memory is the operating
system's maximum for the stage's process, mapped pages of files included. Read and written is what went between memory
and disk; "by calls" adds what the page cache gave and leaves out mapped pages. Written by `make scale`.
"""


def record(run: Mapping[str, Any], costs: Sequence[Mapping[str, Any]], folder: Path = _RESULTS) -> None:
    """Puts one run's stages into both files, in place of those of an equal run that are there."""
    run = {name: str(value) for name, value in run.items()}
    path = folder / "scale.csv"
    kept = [row for row in _rows(path) if any(row[name] != value for name, value in run.items())]
    rows = kept + [{**run, **{name: _text(value) for name, value in cost.items()}} for cost in costs]
    folder.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    parts = [_table(list(group)) for _, group in groupby(rows, key=lambda row: [row[name] for name in run])]
    (folder / "scale.md").write_text("\n".join([_EXPLANATION, *parts]), encoding="utf-8")


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    run = rows[0]
    state = "dropped from the page cache before each stage" if run["cold"] == "True" else "as the page cache has it"
    lines = [
        f"## {run['shape']}, {run['layers']} layers, --memory {run['memory']}",
        "",
        f"{run['blocks']} blocks of 512 tokens, {run['formats']} in {run['quant']}, {run['threads']} threads; "
        f"the checkpoint is {state}.",
        "",
        "| stage | seconds | peak, MB | within --memory | read, MB | by calls | written, MB | by calls | output, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        megabytes = {name: f"{int(row[name]) / 1e6:,.0f}" for name in _BYTES}
        lines.append(
            f"| {row['stage']} | {row['seconds']} | {megabytes['peak_rss']} | {_within(row)} | "
            f"{megabytes['storage_read']} | {megabytes['calls_read']} | "
            f"{megabytes['storage_written']} | {megabytes['calls_written']} | {megabytes['output']} |"
        )
    return "\n".join([*lines, ""])


_BYTES = ("peak_rss", "storage_read", "calls_read", "storage_written", "calls_written", "output")


def _within(row: Mapping[str, str]) -> str:
    if row["runtime_peak_rss"]:
        return f"runtime {int(row['runtime_peak_rss']) / 1e6:,.0f} MB by itself"
    return "yes" if int(row["peak_rss"]) <= parse_size(row["memory"]) else "NO"
