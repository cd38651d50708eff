"""The rows of a curve of divergence against bytes, kept in a CSV file as they are made; a second run continues it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from compressors.model.errors import InputError
from exporter.writing.files import write_atomically

__all__ = ["OURS", "ParetoRow", "RowFile", "best_no_larger"]

OURS = "moe-export"
"""The method of a file with types found by the search; other methods are baselines."""


@dataclass(frozen=True)
class ParetoRow:
    """One measured file."""

    model: str
    method: str  # OURS, or how the experts became fewer before a mix was applied
    mix: str  # llama-quantize's mix; for ours, the label of the file's size
    n_bytes: int  # the size of the file
    share: float  # the size relative to the model's file in 16 bits
    divergence: float  # mean KL divergence from the F32 file's predictions, nats
    divergence_error: float  # standard error of that mean
    top1: float  # share of positions whose most probable token is the F32 file's
    perplexity: float
    structure: str = ""  # the student's structure; empty: all of the model
    predicted: float | None = None  # the divergence that the search expected, nats
    budget: int | None = None  # the most bytes that the file was allowed

    @property
    def key(self) -> tuple[str, str, str]:
        """The values that identify a row: model, method and mix."""
        return self.model, self.method, self.mix


class RowFile:
    """Rows in a CSV file.

    Args:
        path: the file; rows of an earlier run are kept.

    Raises:
        InputError: the file does not hold such rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[ParetoRow] = _read(path) if path.exists() else []

    def find(self, model: str, method: str, mix: str) -> ParetoRow | None:
        """The row of this key, if it was made."""
        return next((row for row in self.rows if row.key == (model, method, mix)), None)

    def add(self, row: ParetoRow) -> None:
        """Adds a row and writes the file; a row of the same key is replaced."""
        self.rows = [*(other for other in self.rows if other.key != row.key), row]
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(ParetoRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in self.rows)
        write_atomically(self.path, text.getvalue())


def best_no_larger(rows: Sequence[ParetoRow], row: ParetoRow) -> ParetoRow | None:
    """The best baseline of the same model that is no larger than a row's file could be; None if there is none."""
    limit = row.n_bytes if row.budget is None else row.budget
    smaller = [other for other in rows if other.model == row.model and other.method != OURS and other.n_bytes <= limit]
    return min(smaller, key=lambda other: other.divergence, default=None)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _read(path: Path) -> list[ParetoRow]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_row(cells) for cells in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no table of this program; remove it, or choose another folder") from None


def _row(cells: dict[str, str]) -> ParetoRow:
    numbers = {name: float(cells[name]) for name in ("share", "divergence", "divergence_error", "top1", "perplexity")}
    return ParetoRow(
        model=cells["model"],
        method=cells["method"],
        mix=cells["mix"],
        n_bytes=int(cells["n_bytes"]),
        structure=cells["structure"],
        predicted=float(cells["predicted"]) if cells["predicted"] else None,
        budget=int(cells["budget"]) if cells["budget"] else None,
        **numbers,
    )
