"""All figures that ``llama-perplexity --kl-divergence`` prints, with its order, names and digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from validate.report import numbers
from validate.report.facts import Report, find, row_name
from validate.report.tables import Cell, Row, Table

__all__ = ["STATISTICS", "Statistic", "statistics_table"]


@dataclass(frozen=True)
class Statistic:
    """One line of the tool, and the place of the same figure in a validation row."""

    name: str
    keys: tuple[str, ...]
    decimals: int = 6
    percent: bool = False

    def printed(self, row: Mapping[str, Any]) -> str:
        """The figure with its standard error, if it has one."""
        error = find(row, *self.keys[:-1], f"{self.keys[-1]}_error")
        text = numbers.fixed(find(row, *self.keys), self.decimals, 100.0 if self.percent else 1.0, error)
        return f"{text} %" if self.percent and text != numbers.DASH else text


_UPPER = {"99.9%": "p999", "99.0%": "p99", "95.0%": "p95", "90.0%": "p90"}
_LOWER = {"10.0%": "p10", "5.0%": "p05", "1.0%": "p01", "0.1%": "p001"}
_KLD = {"Maximum": "max", **_UPPER, "Median": "median", **_LOWER, "Minimum": "min"}
_DELTA_P = {"Maximum": "max", **_UPPER, "75.0%": "p75", "Median": "median", "25.0%": "p25", **_LOWER, "Minimum": "min"}

STATISTICS = (
    Statistic("Mean PPL(Q)", ("perplexity",)),
    Statistic("Mean PPL(base)", ("perplexity_vs_teacher", "base")),
    Statistic("Cor(ln(PPL(Q)), ln(PPL(base)))", ("perplexity_vs_teacher", "correlation"), 2, percent=True),
    Statistic("Mean ln(PPL(Q)/PPL(base))", ("perplexity_vs_teacher", "log_ratio")),
    Statistic("Mean PPL(Q)/PPL(base)", ("perplexity_vs_teacher", "ratio")),
    Statistic("Mean PPL(Q)-PPL(base)", ("perplexity_vs_teacher", "difference")),
    Statistic("Mean KLD", ("kld", "mean")),
    *(Statistic(f"{name} KLD", ("kld", key)) for name, key in _KLD.items()),
    Statistic("Mean Δp", ("delta_p", "mean"), 3, percent=True),
    *(Statistic(f"{name} Δp", ("delta_p", key), 3, percent=True) for name, key in _DELTA_P.items()),
    Statistic("RMS Δp", ("delta_p", "rms"), 3, percent=True),
    Statistic("Same top p", ("top1_agreement",), 3, percent=True),
)
"""The tool's lines; Q is the model, base the original, Δp the change of the right token's probability."""


def statistics_table(report: Report) -> Table:
    """A column for every model that was compared with the original; no rows if none was."""
    models = [row for row in report["validation"] if row.get("perplexity_vs_teacher")]
    rows = [Row(line.name, tuple(Cell(line.printed(row)) for row in models)) for line in STATISTICS]
    return Table(("", *(row_name(row) for row in models)), tuple(rows) if models else ())
