"""Geometry of the charts, which the templates draw: x in percent of the width and y in pixels.

So a chart follows the width of the page, and its text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from validate.report import numbers
from validate.report.facts import BANDS, Report, artifact_name, row_name

__all__ = [
    "BudgetBar",
    "DivergenceChart",
    "ExpertGrid",
    "LineChart",
    "Segment",
    "budget_bars",
    "divergence_chart",
    "expert_grid",
    "kept_ranges",
    "routing_charts",
]

_BUDGET_PARTS = (
    ("weights", "Weights"),
    ("kv_cache", "KV cache"),
    ("compute", "Compute and output buffers"),
    ("reserve", "Runtime reserve"),
)
_MARKERS = ("circle", "square", "diamond")
_MOST_MARKERS = 24  # on one line; beyond that they hide it
_TICK_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
_MOST_COLUMN_LINES = 64  # lines of the grid; on a phone more would cover the cells
_LINE_CHART_HEIGHT = 200.0


@dataclass(frozen=True)
class Segment:
    """One part of a bar, in percent of the scale."""

    kind: str
    label: str
    n_bytes: int
    left: float
    width: float


@dataclass(frozen=True)
class BudgetBar:
    """The memory of one artifact; ``budget`` and ``measured`` are positions in percent of a common scale."""

    artifact: str
    segments: tuple[Segment, ...]
    needed: int
    budget: float
    measured: float | None
    over: bool


def budget_bars(report: Report) -> list[BudgetBar]:
    """One bar per artifact that has a prediction; with a file budget a bar is the file alone."""
    budget = report["budget"]
    part = "file" if budget["kind"] == "file" else "total"
    parts = (("file", "File"),) if part == "file" else _BUDGET_PARTS
    predicted = {name: lines for name, lines in (budget.get("predicted") or {}).items() if lines}
    measured = {name: ((budget.get("measured") or {}).get(name) or {}).get(part) for name in predicted}
    totals: dict[str, int] = {name: sum(lines.get(key) or 0 for key, _ in parts) for name, lines in predicted.items()}
    scale: float = 1.02 * max([budget["bytes"], *totals.values(), *(value or 0 for value in measured.values())])
    bars = []
    for name, lines in predicted.items():
        segments, left = [], 0.0
        found = measured[name]
        for key, label in parts:
            width = 100 * (lines.get(key) or 0) / scale
            segments.append(Segment(key, label, lines.get(key) or 0, left, width))
            left += width
        bars.append(
            BudgetBar(
                artifact=name,
                segments=tuple(segments),
                needed=found or totals[name],
                budget=100 * budget["bytes"] / scale,
                measured=None if found is None else 100 * found / scale,
                over=(found or totals[name]) > budget["bytes"],
            )
        )
    return bars


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: position (percent or pixels) and text."""

    at: float
    label: str


@dataclass(frozen=True)
class DivergenceRow:
    """Median, mean, 99th percentile and maximum of one model, as positions in percent."""

    label: str
    artifact: str
    median: float
    mean: float
    p99: float
    maximum: float
    description: str


@dataclass(frozen=True)
class DivergenceChart:
    """Divergences on a logarithmic axis, with the known bands behind them."""

    rows: tuple[DivergenceRow, ...]
    ticks: tuple[Tick, ...]
    bands: tuple[Segment, ...]


def divergence_chart(report: Report) -> DivergenceChart | None:
    """Charts all models whose divergence was measured and is not zero everywhere; None if there is none."""
    measured = [row for row in report["validation"] if row.get("kld") and (row["kld"]["max"] or 0) > 0]
    if not measured:
        return None
    smallest = min(row["kld"]["median"] or 1.0 for row in measured)
    low = min(-3, max(-6, math.floor(math.log10(max(smallest, 1e-6)))))
    high = max(1, math.ceil(math.log10(max(row["kld"]["max"] for row in measured))))

    def position(value: float) -> float:
        logarithm = math.log10(value) if value > 0 else low
        return 100 * (min(max(logarithm, low), high) - low) / (high - low)

    rows = tuple(
        DivergenceRow(
            label=row_name(row),
            artifact=row["artifact"],
            median=position(row["kld"]["median"]),
            mean=position(row["kld"]["mean"]),
            p99=position(row["kld"]["p99"]),
            maximum=position(row["kld"]["max"]),
            description=", ".join(
                f"{name} {numbers.divergence(row['kld'][key])}"
                for key, name in (("median", "median"), ("mean", "mean"), ("p99", "99 %"), ("max", "maximum"))
            ),
        )
        for row in measured
    )
    ticks = tuple(Tick(position(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1))
    bands = tuple(
        Segment("band", label, 0, position(start), position(end) - position(start)) for start, end, label in BANDS
    )
    return DivergenceChart(rows, ticks, bands)


@dataclass(frozen=True)
class Series:
    """One line: points are (percent, pixels, description)."""

    label: str
    kind: str
    marker: str
    points: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class LineChart:
    """Lines over layers."""

    title: str
    series: tuple[Series, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    height: float


def routing_charts(report: Report) -> list[LineChart]:
    """Charts overlap by layer: the effect of the export, and that of compression, on different scales."""
    rows = report["validation"]
    export = [
        (f"{artifact_name(row['artifact'])} and torch", row["artifact"], agreement)
        for row in rows
        if (agreement := (row.get("routing") or {}).get("vs_torch_student"))
    ]
    across = [agreement for row in rows if (agreement := (row.get("routing") or {}).get("vs_other_runtime"))]
    export += [("The two runtimes", "cross", across[0])] if across else []
    compression = [
        (artifact_name(row["artifact"]), row["artifact"], agreement)
        for row in rows
        if (agreement := (row.get("routing") or {}).get("vs_teacher"))
    ]
    charts = [
        _line_chart("Did the export keep it? Against the student", export),
        _line_chart("What did compression change? Against the original", compression),
    ]
    return [chart for chart in charts if chart is not None]


def _line_chart(title: str, comparisons: Sequence[tuple[str, str, Mapping[str, Any]]]) -> LineChart | None:
    lines = [
        (label, kind, {number: layer["overlap"] for number, layer in enumerate(agreement["per_layer"]) if layer})
        for label, kind, agreement in comparisons
        if agreement.get("per_layer")
    ]
    if not lines:
        return None
    step, n_steps = _axis(min(min(values.values()) for _, _, values in lines))
    floor = 1 - n_steps * step
    n_layers = 1 + max(max(values) for _, _, values in lines)

    def x(layer: int) -> float:
        return 50.0 if n_layers == 1 else 100 * layer / (n_layers - 1)

    def y(value: float) -> float:
        return float(_LINE_CHART_HEIGHT * (1 - value) / (1 - floor))

    series = tuple(
        Series(
            label,
            kind,
            _MARKERS[index % len(_MARKERS)] if n_layers <= _MOST_MARKERS else "point",
            tuple(
                (x(layer), y(value), f"{label}, layer {layer}: {numbers.percent(value)}")
                for layer, value in values.items()
            ),
        )
        for index, (label, kind, values) in enumerate(lines)
    )
    decimals = 1 if step < 0.01 else 0
    y_ticks = tuple(Tick(y(1 - i * step), f"{100 * (1 - i * step):.{decimals}f} %") for i in range(n_steps + 1))
    every = max(1, math.ceil(n_layers / 8))
    x_ticks = tuple(Tick(x(layer), str(layer)) for layer in range(0, n_layers, every))
    return LineChart(title, series, x_ticks, y_ticks, _LINE_CHART_HEIGHT)


def _axis(smallest: float) -> tuple[float, int]:
    """Distance and number of the ticks below 1: two to five, and the smallest value is not under the last."""
    step = next((step for step in _TICK_STEPS if smallest >= 1 - 5 * step), _TICK_STEPS[-1])
    # 0.8 is four steps of 0.05 below 1, whatever binary fractions say.
    return step, max(2, math.ceil((1 - smallest) / step - 1e-9))


@dataclass(frozen=True)
class ExpertGrid:
    """Layers down, the original's experts across; ``kept`` is an SVG path in units of cells."""

    n_layers: int
    n_experts: int
    kept: str
    lines: str
    row_height: int


def expert_grid(report: Report) -> ExpertGrid | None:
    """Charts which experts survived; None if all did, or if the report does not say."""
    kept, n_experts = report["student"].get("kept"), report["source"]["n_experts"]
    if not kept or all(layer is None or len(layer) == n_experts for layer in kept):
        return None
    path = [
        f"M{first} {layer}h{last + 1 - first}v1h{first - last - 1}z"
        for layer, experts in enumerate(kept)
        for first, last in _runs(experts or ())
    ]
    lines = [f"M0 {layer}H{n_experts}" for layer in range(1, len(kept))]
    if n_experts <= _MOST_COLUMN_LINES:
        lines += [f"M{expert} 0V{len(kept)}" for expert in range(1, n_experts)]
    row_height = min(18, max(8, 300 // len(kept)))
    return ExpertGrid(len(kept), n_experts, "".join(path), "".join(lines), row_height)


def kept_ranges(experts: Sequence[int]) -> str:
    """Formats numbers as ``0-3, 5, 8-9``."""
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in _runs(experts))


def _runs(experts: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of every run of consecutive numbers."""
    runs = []
    # Within a run, number minus rank is constant.
    for _, group in groupby(enumerate(sorted(experts)), key=lambda pair: pair[1] - pair[0]):
        members = [expert for _, expert in group]
        runs.append((members[0], members[-1]))
    return runs
