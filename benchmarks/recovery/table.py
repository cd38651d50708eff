"""The tables: ``recovery.csv`` holds every run, ``recovery.md`` shows means over seeds."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev

from benchmarks.quality.table import csv_text
from benchmarks.recovery.arms import ARMS, FULL_VOCABULARY, NONE, ROUTER_KD, Pace
from benchmarks.recovery.measure import HELDOUT_CHUNKS, SELECTION_CHUNKS, Measured
from benchmarks.recovery.runs import KINDS, LADDER_BLOCKS, MODELS, SEEDS, SHORT_BLOCKS, SWEEP_BLOCKS, Run
from benchmarks.recovery.students import ALL_EXPERTS_ON, DENSE, PRUNED, UNCHANGED

__all__ = ["Taught", "ladder", "read", "short", "untaught", "write_csv", "write_markdown"]


@dataclass(frozen=True)
class Taught:
    """The results of one arm for one student, over all seeds that were run."""

    before: Measured  # the student before training
    results: tuple[Measured, ...]  # one for each seed

    @property
    def run(self) -> Run:
        """The run, with any of the seeds."""
        return self.results[0].run

    @property
    def diverged(self) -> bool:
        """Whether the training of any seed made values that are not finite."""
        return any(result.selection is None for result in self.results)

    def mean(self, name: str) -> float:
        """The mean of a measured figure over the seeds."""
        return mean(getattr(result, name) for result in self.results)

    def deviation(self, name: str) -> float | None:
        """Standard deviation over the seeds; None if there is one seed."""
        return stdev(getattr(result, name) for result in self.results) if len(self.results) > 1 else None

    @property
    def closed(self) -> tuple[float, ...]:
        """The share of the student's held-out divergence that is gone, for each seed."""
        assert self.before.divergence
        return tuple(1 - (result.divergence or 0.0) / self.before.divergence for result in self.results)

    @property
    def accepted(self) -> bool:
        """Whether the ladder would keep it: the divergence on the selection split falls with every seed."""
        assert self.before.selection is not None
        found = [result.selection for result in self.results]
        return all(selection is not None and selection < self.before.selection for selection in found)


def write_csv(results: Iterable[Measured], path: Path) -> None:
    """Writes all results, a run in each line."""
    names = [field.name for field in (*fields(Run), *fields(Measured)) if field.name != "run"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for result in results:
            values = asdict(result)
            values |= values.pop("run")
            writer.writerow({name: csv_text(value) for name, value in values.items()})


def read(path: Path) -> list[Measured]:
    """The inverse of :func:`write_csv`, to as many digits as it wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_measured(row) for row in csv.DictReader(file)]


def _measured(row: Mapping[str, str]) -> Measured:
    run = Run(
        row["model"],
        row["student"],
        row["arm"],
        float(row["learning_rate"]),
        int(row["blocks_per_step"]),
        int(row["n_blocks"]),
        int(row["seed"]),
    )
    judged = {name: float(row[name]) if row[name] else None for name in ("selection", "perplexity", "divergence")}
    whole = {name: int(row[name]) for name in ("trained_parameters", "training_bytes", "peak_bytes")}
    return Measured(run, **judged, **whole, seconds=float(row["seconds"]))  # type: ignore[arg-type]


def untaught(results: Iterable[Measured], model: str, student: str) -> Measured | None:
    """The student as compression left it; None if that was not measured."""
    found = [one for one in results if (one.run.model, one.run.student, one.run.arm) == (model, student, NONE)]
    return found[0] if found else None


def _taught(results: Sequence[Measured], model: str, student: str, arm: str, n_blocks: int) -> Taught | None:
    before = untaught(results, model, student)
    wanted = (model, student, arm, n_blocks)
    found = [one for one in results if (one.run.model, one.run.student, one.run.arm, one.run.n_blocks) == wanted]
    return Taught(before, tuple(found)) if before is not None and found else None


def ladder(results: Sequence[Measured], student: str) -> list[Taught]:
    """All arms that taught this student of the fine model with all text, from the least divergence."""
    found = [_taught(results, "fine", student, arm, LADDER_BLOCKS) for arm in ARMS]
    taught = [one for one in found if one is not None]
    return sorted(taught, key=lambda one: float("inf") if one.diverged else one.mean("divergence"))


def short(results: Sequence[Measured], model: str, student: str) -> Taught | None:
    """Router KD with less text; None if it was not run."""
    return _taught(results, model, student, ROUTER_KD, SHORT_BLOCKS)


_EXPLANATION = f"""\
# Teaching a compressed model

Means over seeds ({", ".join(map(str, SEEDS))}: the order of the blocks, and what adapters begin with); *seeds* says how
many were run. Perplexity and *KL*, the mean divergence from the original in nats over the full vocabulary, are those of
the second halves of {HELDOUT_CHUNKS} held-out chunks of 512 tokens, five domains, in float32; ± is the standard
deviation over seeds. *Gap closed* is the share of the untaught student's KL that is gone. *Selection* is the KL on
{SELECTION_CHUNKS} chunks of the selection split, which decides: the ladder accepts what lowers it. Each arm starts from
the untaught student. Training is one epoch of AdamW at *rate*, with 3 % warm-up and linear decay; a step has so many
*blocks* of 512 tokens. *Memory* is that of float32 weights, gradients and Adam's moments, by arithmetic; *peak* the
process's, its libraries included; *CPU s* the training's, on one core. Written by `make bench`.
"""


def write_markdown(results: Sequence[Measured], path: Path) -> None:
    """Writes the explanation and a table for everything that was run."""
    sections = {
        f"fine, 16 of 32 experts left by REAP, {LADDER_BLOCKS * 512:,} tokens": [
            *_ladder(results, PRUNED),
            "",
            *_vocabulary(results),
            "![KL after recovery](recovery.png)",
        ],
        f"fine, each layer's experts condensed into one feed-forward, {LADDER_BLOCKS * 512:,} tokens": (
            _ladder(results, DENSE) if ladder(results, DENSE) else []
        ),
        f"fine against coarse: router KD with {SHORT_BLOCKS * 512:,} tokens": _comparison(results),
        f"Pace, chosen on the selection split: {SWEEP_BLOCKS * 512:,} tokens, seed 0": _sweep(results),
    }
    lines = _EXPLANATION.splitlines()
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section] if section else []
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _ladder(results: Sequence[Measured], student: str) -> list[str]:
    head = (
        "arm | seeds | rate | blocks | perplexity | KL | gap closed | selection | accepted | trained parameters "
        "| memory, MB | CPU s | peak, MB"
    )
    lines = [f"| {head} |", "|" + "---|" * 13]
    rows = {UNCHANGED: "*the original*", ALL_EXPERTS_ON: "*the original, all experts on*", student: "**no recovery**"}
    for name, title in rows.items():
        found = untaught(results, "fine", name)
        if found is not None:
            perplexity, divergence, selection = found.perplexity or 0.0, found.divergence or 0.0, found.selection or 0.0
            # the original's own is zero but for rounding
            figures = [f"{perplexity:.2f}", f"{max(0.0, divergence):.4f}", "-", f"{max(0.0, selection):.4f}"]
            lines.append(_line([title, *["-"] * 3, *figures, *["-"] * 5]))
    return lines + [_line(_row(taught)) for taught in ladder(results, student)]


def _row(taught: Taught) -> list[str]:
    cells = [taught.run.arm, str(len(taught.results)), f"{taught.run.learning_rate:g}"]
    cells.append(str(taught.run.blocks_per_step))
    if taught.diverged:
        cells += ["diverged", *["-"] * 3]
    else:
        cells += [f"{taught.mean('perplexity'):.2f}", _with_deviation(taught, "divergence")]
        cells += [f"{mean(taught.closed):.1%}", f"{taught.mean('selection'):.4f}"]
    return [
        *cells,
        "yes" if taught.accepted else "no",
        f"{taught.results[0].trained_parameters:,}",
        f"{taught.results[0].training_bytes / 1e6:.1f}",
        f"{taught.mean('seconds'):.0f}",
        f"{max(result.peak_bytes for result in taught.results) / 1e6:.0f}",
    ]


def _with_deviation(taught: Taught, name: str) -> str:
    deviation = taught.deviation(name)
    return f"{taught.mean(name):.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def _vocabulary(results: Sequence[Measured]) -> list[str]:
    """How near the teacher's 64 best tokens and one bucket come to its full vocabulary."""
    cached, full = (_taught(results, "fine", PRUNED, arm, LADDER_BLOCKS) for arm in (ROUTER_KD, FULL_VOCABULARY))
    if cached is None or full is None or cached.diverged or full.diverged:
        return []
    seeds = {result.run.seed for result in cached.results} & {result.run.seed for result in full.results}
    with_cache, with_all = (
        mean(result.divergence or 0.0 for result in taught.results if result.run.seed in seeds)
        for taught in (cached, full)
    )
    return [
        f"Routers that learned from the teacher's 64 most probable tokens and one bucket for the rest reach a KL of "
        f"{with_cache:.4f}; from its full vocabulary {with_all:.4f}: a difference of {with_cache / with_all - 1:+.2%}.",
        "",
    ]


def _comparison(results: Sequence[Measured]) -> list[str]:
    lines = []
    for student in KINDS:
        for model in MODELS:
            taught = short(results, model, student)
            if taught is not None and not taught.diverged:
                before = f"{taught.before.divergence:.4f}"
                after, closed = _with_deviation(taught, "divergence"), f"{mean(taught.closed):.1%}"
                lines.append(_line([student, model, str(len(taught.results)), before, after, closed]))
    if not lines:
        return []
    head = ["| student | model | seeds | KL before | KL after | gap closed |", "|" + "---|" * 6]
    return [*head, *lines, "", "![fine against coarse](recovery_fine_coarse.png)"]


def _sweep(results: Sequence[Measured]) -> list[str]:
    lines = ["| arm | rate | blocks | selection KL |", "|" + "---|" * 4]
    for run, found in ((one.run, one.selection) for one in results if one.run.is_sweep):
        rate = f"{run.learning_rate:g}"
        chosen = Pace(run.learning_rate, run.blocks_per_step) == ARMS[run.arm].pace
        cells = [run.arm, f"**{rate}**" if chosen else rate, str(run.blocks_per_step)]
        lines.append(_line([*cells, "diverged" if found is None else f"{found:.4f}"]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
