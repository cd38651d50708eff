"""The table: ``quality.csv`` holds all figures, ``quality.md`` shows them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.quality.measure import CALIBRATION_BLOCKS, HELDOUT_CHUNKS, Measured
from benchmarks.quality.methods import FREQUENCY, SAMPLE_BLOCKS, SHARES

__all__ = ["Difference", "beyond_frequency", "by_divergence", "csv_text", "read", "write_csv", "write_markdown"]

_LARGE_SHARE = max(SHARES)
_FALLING = sorted(SHARES, reverse=True)

_EXPLANATION = f"""\
# Every way of shrinking experts, on the trained models

Two small models lose a quarter and a half of their expert parameters (*removed*: as counted); nothing is trained after.
Perplexity and *KL*, the mean divergence from the original in nats over the full vocabulary, are those of the second
halves of {HELDOUT_CHUNKS} held-out chunks of 512 tokens, five domains, in float32; experts are stored in bfloat16.
Methods know {CALIBRATION_BLOCKS} calibration blocks by their statistics, whose pass *CPU s* leaves out (sequential ones
make their own), and see {SAMPLE_BLOCKS} of them; *peak* includes {{base}} MB of libraries. *Against frequency*: KL
minus that of plain frequency pruning, with two standard errors over the chunks. Written by `make quality`.
"""


@dataclass(frozen=True)
class Difference:
    """How far a method's divergence is from frequency pruning's, chunk by chunk: below 0 is better."""

    mean: float
    two_errors: float

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` by more than two standard errors, else ``level``."""
        if abs(self.mean) <= self.two_errors:
            return "level"
        return "better" if self.mean < 0 else "worse"


def write_csv(results: Iterable[Measured], path: Path) -> None:
    """Writes all results; the chunks' divergences are in one column, between blanks."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measured)])
        writer.writeheader()
        for result in results:
            row = {name: csv_text(value) for name, value in asdict(result).items()}
            writer.writerow(row | {"chunk_divergences": " ".join(f"{value:.5g}" for value in result.chunk_divergences)})


def read(path: Path) -> list[Measured]:
    """The inverse of :func:`write_csv`, to as many digits as it wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_measured(row) for row in csv.DictReader(file)]


def csv_text(value: Any) -> str:
    """A cell of a CSV file: six digits of a float, nothing for None."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _measured(row: Mapping[str, str]) -> Measured:
    numbers = {
        name: float(row[name]) if row[name] else None for name in ("removed", "perplexity", "divergence", "seconds")
    }
    texts = {name: row[name] for name in ("model", "method", "kind", "setting", "smaller_files")}
    return Measured(
        **texts,
        **numbers,  # type: ignore[arg-type]
        share=float(row["share"]),
        peak_bytes=int(row["peak_bytes"]) if row["peak_bytes"] else None,
        chunk_divergences=tuple(map(float, row["chunk_divergences"].split())),
    )


def by_divergence(results: Iterable[Measured], model: str, share: float) -> list[Measured]:
    """One model's results at one share, from the least divergence; refused ones come last."""
    chosen = [result for result in results if (result.model, result.share) == (model, share)]
    return sorted(chosen, key=lambda result: float("inf") if result.divergence is None else result.divergence)


def beyond_frequency(results: Iterable[Measured], result: Measured) -> Difference | None:
    """A result's difference from frequency pruning at the same share; None for a refused one."""
    (frequency,) = (one for one in by_divergence(results, result.model, result.share) if one.method == FREQUENCY)
    if result.divergence is None:
        return None
    differences = [
        own - other for own, other in zip(result.chunk_divergences, frequency.chunk_divergences, strict=True)
    ]
    return Difference(mean(differences), 2 * stdev(differences) / len(differences) ** 0.5)


def write_markdown(results: Sequence[Measured], path: Path) -> None:
    """Writes the explanation and, for each model, the verdict and two tables."""
    base = min(result.peak_bytes for result in results if result.peak_bytes is not None)
    lines = _EXPLANATION.format(base=round(base / 1e6)).splitlines()
    for model in dict.fromkeys(result.model for result in results):
        lines += ["", f"## {model}", "", _sentence(results, model), "", *_methods(results, model)]
        lines += ["", "The same without removing parameters:", "", *_references(results, model)]
    lines += ["", "![divergence of every method](quality.png)"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sentence(results: Sequence[Measured], model: str) -> str:
    """Says which methods beat frequency pruning, and which do not."""
    found: dict[str, list[str]] = {"better": [], "level": [], "worse": []}
    for result in by_divergence(results, model, _LARGE_SHARE):
        difference = beyond_frequency(results, result)
        if difference is not None and result.method != FREQUENCY:
            found[difference.verdict].append(f"{result.method} ({result.divergence:.3f})")
    (frequency,) = (one for one in by_divergence(results, model, _LARGE_SHARE) if one.method == FREQUENCY)
    return (
        f"At {_LARGE_SHARE:.0%}, frequency pruning diverges by {frequency.divergence:.3f} nats. Better by more than "
        f"two standard errors: {_listed(found['better'])}. Not to be told from it: {_listed(found['level'])}. "
        f"Worse: {_listed(found['worse'])}."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _methods(results: Sequence[Measured], model: str) -> list[str]:
    """From the least divergence at the larger share; each share has its columns."""
    heads = [f"removed | perplexity | KL at {share:.0%}" for share in _FALLING]
    lines = [
        f"| method | kind | at {_LARGE_SHARE:.0%} | smaller files | {' | against frequency | '.join(heads)} "
        "| CPU s | peak, MB |",
        "|" + "---|" * (7 + 3 * len(SHARES)),
    ]
    for result in by_divergence(results, model, _LARGE_SHARE):
        name = f"**{result.method}**" if result.method == FREQUENCY else result.method
        cells = [name, result.kind, result.setting, result.smaller_files or "-"]
        cells += [*_figures(result), _compared(results, result)]
        for share in _FALLING[1:]:
            cells += _figures(*(one for one in by_divergence(results, model, share) if one.method == result.method))
        lines.append(_line([*cells, *_cost(result)]))
    return lines


def _figures(result: Measured | None = None) -> list[str]:
    if result is None or result.divergence is None:
        return ["-"] * 3
    return [f"{result.removed:.1%}", f"{result.perplexity:.2f}", f"{result.divergence:.4f}"]


def _compared(results: Sequence[Measured], result: Measured) -> str:
    difference = beyond_frequency(results, result)
    if difference is None or result.method == FREQUENCY:
        return "-"
    return f"{difference.mean:+.3f} ± {difference.two_errors:.3f} {difference.verdict}"


def _references(results: Sequence[Measured], model: str) -> list[str]:
    lines = ["| method | | smaller files | perplexity | KL | CPU s | peak, MB |", "|" + "---|" * 7]
    for result in by_divergence(results, model, 0.0):
        figures = [f"{result.perplexity:.2f}", f"{result.divergence:.4f}"]
        lines.append(_line([result.method, result.setting, result.smaller_files, *figures, *_cost(result)]))
    return lines


def _cost(result: Measured) -> list[str]:
    if result.seconds is None or result.peak_bytes is None:
        return ["-", "-"]
    return [f"{result.seconds:.1f}", f"{result.peak_bytes / 1e6:.0f}"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
