"""The output of ``moe-export validate`` in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from validate.metrics.bootstrap import CONFIDENCE
from validate.report import numbers

__all__ = ["revalidation_table"]

_RUNTIMES = {"torch": "torch", "llama.cpp": "llama.cpp", "onnxruntime": "ONNX Runtime"}


def revalidation_table(result: Mapping[str, Any]) -> RenderableType:
    """Makes the output: the figures with their intervals, then notes on each file, then the verdict."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("", "Perplexity", "Mean divergence,\nnats", "Same top\ntoken", "Routing as in\nthe original"):
        table.add_column(heading, justify="right" if heading else "left")
    reference = result["reference"]
    runtime = _RUNTIMES.get(reference["runtime"], reference["runtime"])
    table.add_row(f"Original\n{runtime}", numbers.perplexity(result["perplexity_teacher"]))
    for row in _measured(result):
        table.add_row(f"{row['artifact'].upper()}, {row['band']}\n{_RUNTIMES[row['runtime']]}", *_figures(row))
    if any(row["perplexity_interval"] for row in _measured(result)):
        table.caption = f"second lines: {100 * CONFIDENCE:.0f} % intervals by bootstrap over chunks of text"
        table.caption_justify = "left"
    return Group(table, Text(), _remarks(result))


def _measured(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The files whose runtime did not die; the deaths of others are listed among the failures."""
    return [row for row in result["rows"] if row["error"] is None]


def _figures(row: Mapping[str, Any]) -> list[str]:
    figures = (
        (numbers.perplexity(row["perplexity"]), numbers.interval(row["perplexity_interval"], numbers.perplexity)),
        (numbers.divergence(row["kld"]["mean"]), numbers.interval(row["kld"]["mean_interval"], numbers.divergence)),
        (numbers.percent(row["top1_agreement"]), numbers.interval(row["top1_agreement_interval"], numbers.percent)),
        (
            numbers.percent(row["routing_overlap_vs_teacher"]),
            numbers.interval(row["routing_overlap_interval"], numbers.percent),
        ),
    )
    return ["\n".join(filter(None, (value, _narrow(ends)))) for value, ends in figures]


def _cost(row: Mapping[str, Any]) -> str:
    memory, on_gpu = (numbers.size_parts(row[name])[0] for name in ("peak_rss_bytes", "device_bytes"))
    reads, writes = (numbers.speed(row[f"{name}_tokens_per_second"]) for name in ("prefill", "decode"))
    where = f" and {on_gpu} on the GPU" if row["device_bytes"] else ""
    return (
        f"{memory} of memory{where} with {row['context']:,} tokens of context; loads in "
        f"{numbers.duration(row['load_seconds'])}, reads {reads} and writes {writes} tokens/s"
    )


def _narrow(ends: str) -> str:
    return ends.replace(" to ", numbers.DASH).removesuffix(" %")


def _remarks(result: Mapping[str, Any]) -> Text:
    remarks = Text()
    for row in _measured(result):
        remarks.append(f"{row['artifact'].upper()}: {_cost(row)}\n")
        for note in row["notes"]:
            remarks.append(f"{row['artifact'].upper()}: {note}\n")
    n_checks = len(result["checks"])
    verdict = f"Passed all {n_checks} checks"
    if all(check["name"].endswith(".finite") for check in result["checks"]):
        verdict = "Only that the logits are numbers was checked: give --require for more"
    if not result["passed"]:
        verdict = f"Failed {len(result['failures'])} of {n_checks} checks"
    remarks.append(verdict, style="bold green" if result["passed"] else "bold red")
    for failure in result["failures"]:
        remarks.append(f"\n  {failure}", style="red")
    for row in result["rows"]:
        for symptom in row["symptoms"]:
            remarks.append(f"\n  {row['artifact'].upper()}: {symptom}", style="yellow")
    return remarks
