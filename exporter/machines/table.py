"""The rows of ``fits`` for a terminal, and as data for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from exporter.estimating.sizes import format_size
from exporter.machines.rows import Fit, NoFit
from exporter.publishing.search_figures import described_types, named_types

__all__ = ["fits_data", "fits_table", "server_line"]


def fits_table(rows: Sequence[Fit | NoFit]) -> RenderableType:
    """A line for each machine; below, how llama-server shares the files of machines with two memories."""
    table = Table("machine", "memory", "file", "bits", "mostly", "keeps", "divergence", "tokens/s", box=None)
    for row in rows:
        machine = (row.machine.name, _short(row.machine.budget))
        if isinstance(row, NoFit):
            table.add_row(*machine, "-", "", "", "", "", "")
            continue
        low, high = row.band
        table.add_row(
            *machine,
            _short(row.prediction.file),
            f"{row.bits_per_weight:.2f}",
            named_types(row.choice).removeprefix("types by tensor, mostly "),
            row.keeps,
            f"{low:.1g}-{high:.1g}" if high else "0",
            f"{row.placement.tokens_per_second:.0f}",
        )
    return Group(table, *_notes(rows))


def fits_data(rows: Sequence[Fit | NoFit]) -> list[dict[str, Any]]:
    """The rows as data for JSON; sizes are bytes, divergences nats."""
    return [_too_small(row) if isinstance(row, NoFit) else _fitting(row) for row in rows]


def server_line(row: Fit) -> str:
    """The command that runs the file on its machine."""
    cache = () if row.kv_type == "f16" else ("-ctk", row.kv_type, "-ctv", row.kv_type)
    return " ".join(("llama-server", "-m", "FILE.gguf", "-c", str(row.context), *cache, *row.placement.options))


def _notes(rows: Sequence[Fit | NoFit]) -> Iterator[str]:
    """Sentences for which the table's cells have no room."""
    if any(isinstance(row, Fit) for row in rows):
        yield ""
        yield "file: GGUF, as a run with --formats gguf writes it; ONNX often needs more memory"
        yield "divergence: from the original, in nats, as expected; a run measures it"
        yield "tokens/s: the most that the memory's bandwidth allows"
    for row in rows:
        if isinstance(row, NoFit):
            yield f"{row.machine.name}: {row.why}"
        elif row.machine.card is not None and row.machine.ram is not None:
            yield f"{row.machine.name}: {server_line(row)}"


def _fitting(row: Fit) -> dict[str, Any]:
    low, high = row.band
    return {
        "machine": row.machine.name,
        "memory": row.machine.budget,
        "fits": True,
        "file": row.prediction.file,
        "total": row.prediction.total,
        "bits_per_weight": row.bits_per_weight,
        "types": described_types(row.choice),
        "keeps": row.keeps,
        "divergence": {"expected": row.divergence, "from": low, "to": high},
        "tokens_per_second": row.placement.tokens_per_second,
        "run": server_line(row),
    }


def _too_small(row: NoFit) -> dict[str, Any]:
    return {"machine": row.machine.name, "memory": row.machine.budget, "fits": False, "why": row.why}


def _short(n_bytes: int) -> str:
    """The size in decimal units alone."""
    return format_size(n_bytes).partition(" (")[0]
