"""Geometry of a plot of divergence against bytes: x in percent of the width and y in pixels, which a template draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from validate.report import numbers
from validate.report.charts import Tick
from validate.report.facts import artifact_name

__all__ = ["Front", "Mark", "Measured", "ParetoPlot", "frontier", "pareto_plot"]

_HEIGHT = 320.0
_STEPS = (1, 2, 5)  # of a decade
_MOST_TICKS = 8

_Scale = Callable[[float], float]
"""Gives a value's place on an axis."""


@dataclass(frozen=True)
class Measured:
    """A file to be plotted; files whose divergence was not measured, or is not positive, are left out."""

    label: str
    kind: str  # decides colour and frontier
    n_bytes: int
    divergence: float | None  # in nats
    description: str


@dataclass(frozen=True)
class Mark:
    """A point with its text."""

    x: float
    y: float
    label: str
    description: str
    on_frontier: bool  # no file of its kind is both smaller and closer


@dataclass(frozen=True)
class Front:
    """The points of a kind, the smallest first, and the corners of the line through those on the frontier."""

    name: str
    kind: str
    marker: str
    marks: tuple[Mark, ...]
    line: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ParetoPlot:
    """A frontier for each kind of file."""

    fronts: tuple[Front, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    height: float


def frontier(files: Iterable[Measured]) -> list[Measured]:
    """The files that no other one beats in both: at least as close in no more bytes. The smallest first."""
    best: list[Measured] = []
    for file in sorted(files, key=lambda file: (file.n_bytes, file.divergence or 0.0)):
        assert file.divergence is not None, "only measured files are plotted"
        if not best or file.divergence < (best[-1].divergence or 0.0):
            best.append(file)
    return best


def pareto_plot(files: Sequence[Measured]) -> ParetoPlot | None:
    """Plots all files that were measured; None if there is none."""
    measured = [file for file in files if file.divergence is not None and file.divergence > 0]
    if not measured:
        return None
    x_ticks, x = _bytes_axis([file.n_bytes for file in measured])
    y_ticks, y = _divergence_axis([file.divergence or 0.0 for file in measured])
    fronts = []
    for marker, kind in zip(("circle", "square"), dict.fromkeys(sorted(file.kind for file in measured)), strict=False):
        of_kind = sorted((file for file in measured if file.kind == kind), key=lambda file: file.n_bytes)
        best = frontier(of_kind)
        marks = tuple(
            Mark(x(file.n_bytes), y(file.divergence or 0.0), file.label, file.description, file in best)
            for file in of_kind
        )
        line = tuple((x(file.n_bytes), y(file.divergence or 0.0)) for file in best)
        fronts.append(Front(artifact_name(kind), kind, marker, marks, line))
    return ParetoPlot(tuple(fronts), x_ticks, y_ticks, _HEIGHT)


def _bytes_axis(sizes: Sequence[int]) -> tuple[tuple[Tick, ...], _Scale]:
    """A linear axis between round numbers of bytes, which has room on both sides."""
    low, high = min(sizes), max(sizes)
    margin = max(0.08 * (high - low), 0.02 * high)
    start, end = max(0.0, low - margin), high + margin
    step = _round_step((end - start) / (_MOST_TICKS - 1))
    ticks = [number * step for number in range(math.ceil(start / step), math.floor(end / step) + 1)]

    def position(n_bytes: float) -> float:
        return 100 * (n_bytes - start) / (end - start)

    return tuple(Tick(position(tick), numbers.size_parts(round(tick))[0]) for tick in ticks), position


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below ``least``."""
    decade = 10.0 ** math.floor(math.log10(least))
    return next(factor * decade for factor in (*_STEPS, 10) if factor * decade >= least)


def _divergence_axis(divergences: Sequence[float]) -> tuple[tuple[Tick, ...], _Scale]:
    """A logarithmic axis from the step below the smallest divergence to the one above the largest."""
    decades = range(math.floor(math.log10(min(divergences))) - 1, math.ceil(math.log10(max(divergences))) + 2)
    steps = [factor * 10.0**decade for decade in decades for factor in _STEPS]
    low = max(step for step in steps if step < min(divergences))
    high = min(step for step in steps if step > max(divergences))

    def position(divergence: float) -> float:
        return _HEIGHT * (math.log10(high) - math.log10(divergence)) / (math.log10(high) - math.log10(low))

    shown = [step for step in steps if low <= step <= high]
    if len(shown) > 12:  # whole decades are enough
        shown = [step for step in shown if math.isclose(math.log10(step), round(math.log10(step)))]
    return tuple(Tick(position(step), f"{step:.6f}".rstrip("0").rstrip(".")) for step in shown), position
