"""The tables of the report as rows of text; one macro of the template draws them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from validate.report import numbers
from validate.report.facts import (
    Report,
    artifact_name,
    check_name,
    check_value,
    checks,
    find,
    loss_name,
    requirement,
    row_name,
    rung_outcome,
)

__all__ = [
    "Cell",
    "Row",
    "Table",
    "artifact_table",
    "budget_table",
    "check_table",
    "cost_table",
    "fidelity_table",
    "load_table",
    "recovery_table",
    "routing_table",
    "search_table",
    "stage_table",
    "text_table",
]


@dataclass(frozen=True)
class Cell:
    """One value; ``note`` is small print, ``tone`` good or bad, ``bar`` the length of a bar between 0 and 1.

    ``floor`` is the runtime's own part of the same figure.
    """

    text: str
    note: str = ""
    tone: str = ""
    bar: float | None = None
    code: bool = False
    floor: str = numbers.DASH


@dataclass(frozen=True)
class Row:
    """A named row; with ``error`` set nothing was measured and the row says why instead."""

    name: str
    cells: tuple[Cell, ...] = ()
    kind: str = ""  # decides the colour of the mark before the name
    note: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first heading stands over the names, so there is one more than cells in a row."""

    headings: tuple[str, ...]
    rows: tuple[Row, ...]


_BUFFERS = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "recurrent_state": "recurrent state",
    "compute": "compute",
    "output": "output",
}


def budget_table(report: Report) -> Table:
    """The parts of the memory, by artifact."""
    predicted = {name: lines for name, lines in (find(report, "budget", "predicted") or {}).items() if lines}
    measured = find(report, "budget", "measured") or {}
    limit = report["budget"]["bytes"]

    def row(name: str, values: Sequence[int | None], kind: str = "", limited: bool = False) -> Row:
        cells = []
        for value in values:
            tone = "" if value is None or not limited else "bad" if value > limit else "good"
            decimal, binary = numbers.size_parts(value)
            cells.append(Cell(decimal, note="" if decimal == binary else binary, tone=tone))
        return Row(name, tuple(cells), kind)

    names = list(predicted)
    of_files = report["budget"]["kind"] == "file"
    rows = [
        row("Weights", [predicted[name].get("weights") for name in names], "weights"),
        row("KV cache", [predicted[name].get("kv_cache") for name in names], "kv_cache"),
        row("Compute and output buffers", [predicted[name].get("compute") for name in names], "compute"),
        row("Runtime reserve", [predicted[name].get("reserve") for name in names], "reserve"),
        row("Predicted total", [predicted[name].get("total") for name in names], limited=not of_files),
        *(
            row(f"Reported by the runtime: {what}", [find(measured, name, "buffers", key) for name in names])
            for key, what in _BUFFERS.items()
            if any(find(measured, name, "buffers", key) for name in names)
        ),
        row("Measured total", [find(measured, name, "total") for name in names], limited=not of_files),
        row("Measured file", [find(measured, name, "file") for name in names], limited=of_files),
        row("Budget", [limit] * len(names), "limit"),
    ]
    return Table(("", *(artifact_name(name) for name in names)), tuple(rows))


def fidelity_table(report: Report) -> Table:
    """The distance of every model, in every runtime, from the original."""
    rows = []
    for row in report["validation"]:
        kld, before, value = row.get("kld") or {}, row.get("perplexity_teacher"), row.get("perplexity")
        is_teacher = row["artifact"] == "teacher"
        moved = "" if is_teacher or value is None else numbers.change(before, value)
        student = None if row["artifact"] in ("teacher", "student") else row.get("perplexity_student_torch")
        cells = (
            Cell(
                numbers.perplexity(value, row.get("perplexity_error")),
                note=numbers.interval(row.get("perplexity_interval"), numbers.perplexity),
            ),
            Cell(moved or numbers.DASH),
            Cell(numbers.change(student, value)),
            Cell(
                numbers.divergence(kld.get("mean")),
                note=numbers.interval(kld.get("mean_interval"), numbers.divergence),
                floor=numbers.divergence(find(row, "floor", "same_weights", "kld", "mean")),
            ),
            *(Cell(numbers.divergence(kld.get(key))) for key in ("median", "p99", "max")),
            Cell(
                numbers.percent(row.get("top1_agreement")),
                note=numbers.interval(row.get("top1_agreement_interval"), numbers.percent),
                floor=numbers.percent(find(row, "floor", "same_weights", "top1_agreement")),
            ),
        )
        rows.append(_measured_row(row, cells))
    headings = (
        "Model",
        "Perplexity",
        "From the original",
        "From the student",
        "Mean divergence",
        "Median",
        "99 %",
        "Maximum",
        "Same top token",
    )
    return Table(headings, tuple(rows))


def routing_table(report: Report) -> Table:
    """Overall routing agreement of every comparison that was made."""
    across: list[Row] = []
    export: list[Row] = []
    compression: list[Row] = []
    for row in report["validation"]:
        routing, name = row.get("routing") or {}, artifact_name(row["artifact"])
        if agreement := routing.get("vs_torch_student"):
            floor = find(row, "floor", "same_weights", "routing", "overlap")
            export.append(_agreement(f"{name} and the student in torch", row["artifact"], agreement, floor=floor))
        if agreement := routing.get("router_alone"):
            export.append(_agreement(f"{name}, routers alone", row["artifact"], agreement))
        if agreement := routing.get("vs_other_runtime"):
            across.append(_agreement("llama.cpp and ONNX Runtime", "cross", agreement))
        if agreement := routing.get("vs_teacher"):
            compression.append(_agreement(f"{name} and the original", row["artifact"], agreement, mapped=True))
    # Both files report the comparison with each other: one of them is enough.
    rows = [*export, *across[:1], *compression]
    headings = (
        "Comparison",
        "Overlap",
        "Without ties",
        "Exact set",
        "Top expert",
        "Weighted overlap",
        "Gate weight kept",
    )
    return Table(headings, tuple(rows))


def load_table(report: Report) -> Table:
    """The spread of each model's tokens over its experts."""
    rows = []
    for name, load in (report.get("load") or {}).items():
        cells = (
            Cell(f"{load['mean_variation']:.2f}"),
            Cell(f"{load['largest']:.1f}", note="even shares"),
            Cell(numbers.count(load["n_dead"]), note=f"of {numbers.count(_n_experts(load))}"),
        )
        rows.append(Row(artifact_name(name), cells, kind=name))
    return Table(("Model", "Coefficient of variation", "Busiest expert", "Dead experts"), tuple(rows))


def _n_experts(load: Mapping[str, Any]) -> int:
    return sum(len(layer) for layer in load["tokens"] if layer)


def recovery_table(report: Report) -> Table:
    """Every rung that was tried or refused, with its figures on the selection split before and after."""
    rows = []
    for rung in report["recovery"]:
        before, after = rung.get("selection_kld_before"), rung.get("selection_kld_after")
        tone = "good" if rung.get("accepted") else "bad"
        cells = (
            Cell(numbers.divergence(before)),
            Cell(numbers.divergence(after), note="" if after is None else numbers.change(before, after), tone=tone),
            _perplexities(rung.get("selection_perplexity_before"), rung.get("selection_perplexity_after")),
            Cell(rung_outcome(rung), note=rung.get("why") or "", tone=tone),
            Cell(numbers.count(rung.get("steps"))),
            Cell(numbers.count(rung.get("tokens"))),
            Cell(numbers.DASH if rung.get("learning_rate") is None else f"{rung['learning_rate']:g}"),
            Cell(numbers.duration(rung.get("seconds"))),
        )
        rows.append(Row(str(rung["rung"]), cells, note=loss_name(str(rung.get("loss") or ""))))
    headings = ("Rung", "Before", "After", "Perplexity", "Outcome", "Steps", "Tokens", "Learning rate", "Time")
    return Table(headings, tuple(rows))


def search_table(report: Report) -> Table:
    """The files that were considered before one was chosen, with their figures on the selection split."""
    rows = []
    for candidate in report.get("search") or []:
        tone = "good" if candidate["is_chosen"] else ""
        cells = (
            Cell(candidate["types"]),
            Cell(numbers.size(candidate["bytes"])),
            Cell(numbers.divergence(candidate["predicted"])),
            Cell(numbers.divergence(candidate["measured"]), tone=tone),
            Cell("chosen" if candidate["is_chosen"] else "baseline" if candidate["is_baseline"] else "not taken"),
        )
        rows.append(Row(artifact_name(candidate["format"]), cells, note=candidate["keeps"]))
    headings = ("File", "Types", "Size", "Predicted divergence", "Measured divergence", "Outcome")
    return Table(headings, tuple(rows))


def _perplexities(before: float | None, after: float | None) -> Cell:
    note = "" if before is None or after is None else f"before {numbers.perplexity(before)}"
    return Cell(numbers.perplexity(after), note=note)


def cost_table(report: Report) -> Table:
    """Memory and speed by runtime; rows without a measurement are left out unless they crashed."""
    keys = ("peak_rss_bytes", "load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")
    rows = []
    for row in report["validation"]:
        if not row.get("error") and all(row.get(key) is None for key in keys):
            continue
        peak, base = row.get("peak_rss_bytes"), row.get("base_rss_bytes")
        cells = (
            Cell(*numbers.size_parts(peak)),
            Cell(*numbers.size_parts(base)),
            Cell(numbers.duration(row.get("load_seconds"))),
            Cell(numbers.speed(row.get("prefill_tokens_per_second")), note=_of_runs(row.get("prefill_runs"))),
            Cell(numbers.speed(row.get("decode_tokens_per_second")), note=_of_runs(row.get("decode_runs"))),
        )
        rows.append(_measured_row(row, cells))
    headings = (
        "Model",
        "Peak memory",
        "Runtime alone",
        "Load",
        "Prefill, tokens/s",
        "Decode, tokens/s",
    )
    return Table(headings, tuple(rows))


def _of_runs(n_runs: int | None) -> str:
    return "" if n_runs is None else "of one run" if n_runs == 1 else f"median of {n_runs} runs"


def check_table(report: Report) -> Table:
    """Every check against its threshold, failures first."""
    rows = []
    for check in checks(report):
        passed = bool(check["passed"])
        note = "" if check_name(check) == check["name"] else str(check["name"])
        outcome = Cell("✓ passed" if passed else "✗ failed", tone="good" if passed else "bad")
        rows.append(Row(check_name(check), (outcome, Cell(check_value(check)), Cell(requirement(check))), note=note))
    return Table(("Check", "Outcome", "Value", "Required"), tuple(rows))


def artifact_table(report: Report) -> Table:
    """Every written file with its exact size and hash."""
    rows = []
    for artifact in report["artifacts"]:
        for path, file in artifact["files"].items():
            cells = (
                Cell(numbers.exact_bytes(file["bytes"]), note=numbers.size(file["bytes"])),
                Cell(file["sha256"], code=True),
            )
            rows.append(Row(path, cells, artifact["format"]))
    return Table(("File", "Size", "SHA-256"), tuple(rows))


def text_table(report: Report) -> Table:
    """The three splits of text with their hashes."""
    names = {"calibration": "Calibration", "selection": "Selection", "heldout": "Held-out"}
    rows = [
        Row(
            name,
            (
                Cell(numbers.count(split.get("documents"))),
                Cell(numbers.count(split.get("blocks"))),
                Cell(str(split["sha256"]), code=True),
            ),
        )
        for key, name in names.items()
        if (split := find(report, "text", key))
    ]
    of_files = find(report, "text", "calibration", "blocks_by_file") or {}
    rows[1:1] = [
        Row(f"Calibration: {file}", (Cell(""), Cell(numbers.count(n_blocks)), Cell("")))
        for file, n_blocks in of_files.items()
    ]
    return Table(("Text", "Documents", "Blocks", "SHA-256"), tuple(rows))


def stage_table(report: Report) -> Table:
    """Time, peak memory and bytes read of the original, of every stage in the order they ran."""
    timings, memory = report.get("timings") or {}, report.get("peak_rss_bytes") or {}
    read = report.get("source_bytes_read") or {}
    longest, largest = max([*timings.values(), 1e-9]), max([*memory.values(), 1])
    rows = []
    for stage in [*timings, *(name for name in memory if name not in timings)]:
        seconds, peak = timings.get(stage), memory.get(stage)
        decimal, binary = numbers.size_parts(peak)
        cells = (
            Cell(numbers.duration(seconds), bar=None if seconds is None else seconds / longest),
            Cell(decimal, note="" if decimal == binary else binary, bar=None if peak is None else peak / largest),
            Cell(numbers.size_parts(read.get(stage))[0]),
        )
        rows.append(Row(stage, cells))
    return Table(("Stage", "Time", "Peak memory", "Read of the original"), tuple(rows))


def _measured_row(row: Mapping[str, Any], cells: tuple[Cell, ...]) -> Row:
    version = str(row.get("runtime_version") or "")
    return Row(row_name(row), cells, kind=row["artifact"], note=version, error=row.get("error"))


def _agreement(
    name: str, kind: str, agreement: Mapping[str, Any], mapped: bool = False, floor: float | None = None
) -> Row:
    overlap_interval = numbers.interval(agreement.get("overlap_interval"), numbers.percent)
    overlap = Cell(numbers.percent(agreement["overlap"]), note=overlap_interval, floor=numbers.percent(floor))
    cells = [overlap, _without_ties(agreement)]
    cells += [Cell(numbers.percent(agreement[key])) for key in ("exact", "top1", "weighted")]
    # Without an expert map nothing can be dropped: the figure is 1 by definition and says nothing.
    cells.append(Cell(numbers.percent(agreement.get("kept_gate_weight") if mapped else None)))
    return Row(name, tuple(cells), kind)


def _without_ties(agreement: Mapping[str, Any]) -> Cell:
    ties = agreement.get("ties") or {}
    differing = ties.get("differing_tied")
    note = "" if differing is None else f"{numbers.percent(differing)} of differing are ties"
    return Cell(numbers.percent(ties.get("overlap_without_ties")), note=note)
