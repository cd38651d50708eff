"""Keeps measured runs in ``benchmarks/results/whole_run.json`` and shows them, with the goals, in ``whole_run.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.whole_run.watched import Cost

__all__ = ["Figures", "Part", "Side", "keep_side", "kept_side", "record"]

_RESULTS = Path(__file__).parents[1] / "results"
_FILE = "whole_run.json"
_TEXTS_STAGE = "teacher_texts"
_MOST_TIME, _MOST_MEMORY, _MOST_READS, _MOST_PASSES = 1.25, 3_500_000_000, 3, 16
_DISK_OF_SOURCE = 0.1

_EXPLANATION = """\
# The whole command against llama.cpp's own tools

The same checkpoint of real shape with random weights, all experts kept, one GGUF file, for the same figures: perplexity
of the original and of the file, and the file's divergence. The same calibration tokens for the importance matrix, the
same held-out tokens, threads, and a source that is in the page cache. Theirs is `convert_hf_to_gguf.py` to BF16,
`llama-imatrix`, `llama-quantize`, and `llama-perplexity` for the original's logits and for the file, each with its own
defaults, compiled from the sources of the llama-cpp-python that we use. Ours is the command that a person types, with
`--context 512`, which is theirs by default: the file's memory and speed are measured with a cache of so many tokens. It
also compares routing, computes the file's weights in torch, and lets the original and the file write texts.

*Peak* is the largest resident size of one process, mapped pages of files included; *together* that of all processes at
once, shared pages counted once, sampled every ten seconds. Bytes are the kernel's: *disk* between memory and disk,
*calls* by read and write calls, which leave mapped pages out. *Reads* are the bytes that positioned reads take from the
source, divided by its size. *Disk* is the most that the files of a side take at once; files without a name, which hold
keys and values of texts, are not in it. `llama-perplexity` keeps the original's logits no lower than 16 below the
largest, so its perplexity of an original whose successors stand out far is too low.

How the times compare depends on the processor: with AVX-512's instructions for BF16, llama.cpp runs the original about
three times faster than with AVX2, and ours is up to twice as fast. There, with one thread, an earlier version of ours
took 1.22 times as long as theirs. Written by `python -m benchmarks.whole_run`.
"""

_HELD = (
    "The kernel held ours, all its processes together, to that memory, pages of the files that it maps or writes",
    "included: a control group, whose peak is the one below. Theirs had all memory of the machine.",
)


@dataclass(frozen=True)
class Figures:
    """What both sides say about the file that they wrote."""

    n_bytes: int  # of the file
    perplexity_original: float
    perplexity: float
    divergence: float  # mean over the scored positions, nats
    top1: float  # share of positions at which both find the same token most probable


@dataclass(frozen=True)
class Part:
    """The cost of a tool or of a stage; sizes in bytes."""

    name: str
    seconds: float
    peak: int | None  # of its process
    cost: Cost | None = None  # None for a stage, of which the kernel's counts are not known
    peak_disk: int | None = None
    source_reads: int | None = None  # None: not counted, as the files are mapped


@dataclass(frozen=True)
class Side:
    """A side's parts and figures."""

    parts: Sequence[Part]
    figures: Figures
    peak_held: int | None = None
    """The most bytes that the kernel counted, where it held all processes and their files' pages to a limit."""


def keep_side(path: Path, run: Mapping[str, Any], side: Side) -> None:
    """Writes a side of a run into a file of its own."""
    path.write_text(json.dumps({"run": dict(run), "side": asdict(side)}, indent=1) + "\n", encoding="utf-8")


def kept_side(path: Path, run: Mapping[str, Any]) -> Side | None:
    """The side of an equal run that the file holds; None if it holds none."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"run": None}
    if kept["run"] != run:
        return None
    side = kept["side"]
    parts = [Part(**{**part, "cost": part["cost"] and Cost(**part["cost"])}) for part in side["parts"]]
    return Side(parts, Figures(**side["figures"]), side["peak_held"])


def record(
    run: Mapping[str, Any],
    source_bytes: int,
    ours: Side,
    theirs: Side,
    folder: Path = _RESULTS,
    *,
    in_parts: bool = False,
) -> None:
    """Puts a run into both files, in place of an equal one that is there.

    Args:
        run: what it was made with: shape, layers, blocks, the processor's vector instructions, ...
        source_bytes: size of the checkpoint.
        ours: the first part is the whole command.
        theirs: one part for each tool.
        folder: where the files are.
        in_parts: the sides were measured by two starts of the benchmark.
    """
    path = folder / _FILE
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    new = {"run": dict(run), "source_bytes": source_bytes, "ours": asdict(ours), "theirs": asdict(theirs)}
    new["in_parts"] = in_parts
    runs = [one for one in runs if one["run"] != new["run"]] + [json.loads(json.dumps(new))]
    path.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    sections = "\n".join(line for one in runs for line in _section(one))
    (folder / "whole_run.md").write_text(f"{_EXPLANATION}\n{sections.rstrip()}\n", encoding="utf-8")


def _section(one: Mapping[str, Any]) -> list[str]:
    run, ours, theirs = one["run"], one["ours"], one["theirs"]
    whole, *stages = ours["parts"]
    return [
        f"## {run['shape']}, {run['layers']} layers ({_gigabytes(one['source_bytes'])}), {run['quant']}",
        "",
        f"{run['blocks']} calibration blocks and {run['chunks']} held-out chunks of 512 tokens, {run['threads']} "
        f"threads, {run['instructions']}, `--memory {run['memory']}`."
        + (" The sides were measured at different times on the same machine." if one.get("in_parts") else ""),
        *(_HELD if ours.get("peak_held") else ()),
        "",
        "| | seconds | CPU | peak | together | disk read | written | calls read | written | disk | reads |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(part, one["source_bytes"]) for part in theirs["parts"]),
        _row(_sum_of(theirs["parts"]), one["source_bytes"]),
        _row({**whole, "name": "**ours**"}, one["source_bytes"]),
        *(_row({**part, "name": f"ours: {part['name']}"}, one["source_bytes"]) for part in stages),
        "",
        "| | file | perplexity, original | file | mean divergence | same top token |",
        "|---|---|---|---|---|---|",
        _figures_row("theirs", theirs["figures"]),
        _figures_row("ours", ours["figures"]),
        "",
        "| goal | allowed | measured | |",
        "|---|---|---|---|",
        *_goals(one, whole, stages),
        "",
    ]


def _sum_of(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    costs = [part["cost"] for part in parts]
    together = {name: sum(cost[name] for cost in costs) for name in costs[0]}
    together |= {name: max(cost[name] for cost in costs) for name in ("peak_process", "peak_together")}
    return {
        "name": "**theirs**",
        "seconds": together["seconds"],
        "peak": together["peak_process"],
        "cost": together,
        "peak_disk": max(part["peak_disk"] for part in parts),
        "source_reads": None,
    }


def _row(part: Mapping[str, Any], source_bytes: int) -> str:
    cost = part["cost"] or {}
    sizes = ("peak_together", "storage_read", "storage_written", "calls_read", "calls_written")
    reads = part["source_reads"]
    cells = [
        part["name"],
        f"{part['seconds']:.1f}",
        f"{cost['cpu_seconds']:.1f}" if cost else "",
        _gigabytes(part["peak"]),
        *(_gigabytes(cost.get(name)) for name in sizes),
        _gigabytes(part["peak_disk"]),
        "" if reads is None else f"{reads / source_bytes:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _figures_row(name: str, figures: Mapping[str, Any]) -> str:
    return (
        f"| {name} | {_gigabytes(figures['n_bytes'])} | {figures['perplexity_original']:.2f} "
        f"| {figures['perplexity']:.2f} | {figures['divergence']:.5f} | {100 * figures['top1']:.2f} % |"
    )


def _goals(one: Mapping[str, Any], whole: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    source_bytes, their_seconds = one["source_bytes"], _sum_of(one["theirs"]["parts"])["seconds"]
    in_texts = sum(part["source_reads"] for part in stages if part["name"] == _TEXTS_STAGE) / source_bytes
    reads = whole["source_reads"] / source_bytes - in_texts
    most_disk = one["ours"]["figures"]["n_bytes"] + _DISK_OF_SOURCE * source_bytes
    return [
        _goal("time, of theirs", f"{_MOST_TIME} x", whole["seconds"] / their_seconds, _MOST_TIME, "{:.2f} x"),
        _goal("peak memory", _gigabytes(_MOST_MEMORY), one["ours"].get("peak_held") or whole["peak"], _MOST_MEMORY),
        _goal("disk: the output and a tenth of the source", _gigabytes(most_disk), whole["peak_disk"], most_disk),
        _goal("reads of the source, without texts", str(_MOST_READS), reads, _MOST_READS, "{:.2f}"),
        _goal("reads for the original's texts", str(_MOST_PASSES), in_texts, _MOST_PASSES, "{:.2f}"),
    ]


def _goal(name: str, allowed: str, value: float, limit: float, shown: str | None = None) -> str:
    measured = _gigabytes(value) if shown is None else shown.format(value)
    return f"| {name} | {allowed} | {measured} | {'reached' if value <= limit else 'MISSED'} |"


def _gigabytes(n_bytes: float | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 1e9:.2f} GB"
