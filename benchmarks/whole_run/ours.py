"""Our side: the one command, as a person types it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.whole_run.control_group import control_group
from benchmarks.whole_run.table import Figures, Part, Side
from benchmarks.whole_run.texts import Texts
from benchmarks.whole_run.watched import Watched, run_watched
from exporter.estimating.sizes import parse_size
from exporter.file_names import REPORT
from exporter.run import EXIT_CHECK_FAILED

__all__ = ["run_ours"]

_OUTSIDE = "plan and report"
_NO_LIMIT = "1000TB"
_CONTEXT = "512"  # that of llama-perplexity and llama-imatrix unless they are told otherwise


def run_ours(source: Path, texts: Texts, folder: Path, quant: str, memory: str, threads: int, *, hold: bool) -> Side:
    """Runs the command: the parts of its cost, the first of which is the whole, and its figures.

    Args:
        source: the checkpoint.
        texts: what both sides read.
        folder: for the output, an empty folder.
        quant: a mix of llama-quantize.
        memory: as ``--memory`` takes it.
        threads: as ``--threads`` takes it.
        hold: if the kernel holds all its processes together to ``memory``, with the pages of files that they read
            or write. Those of the source do not count, if they are in memory before.
    """
    out = folder / "out"
    work = Path(f"{out}.work")
    command: list[str | Path] = [sys.executable, "-m", "exporter", source, "--out", out, "--formats", "gguf"]
    command += ["--budget", _NO_LIMIT, "--budget-kind", "file", "--quant", quant, "--quantizer", "kernel"]
    command += ["--context", _CONTEXT, "--recover", "none", "--calibration", texts.calibration, "--text", texts.heldout]
    command += ["--memory", memory, "--threads", str(threads), "--force"]
    with control_group(parse_size(memory)) if hold else nullcontext() as group:
        cost, watched, _ = run_watched(
            command if group is None else group.inside(command),
            {"OMP_NUM_THREADS": str(threads)},
            source=source,
            folders=[out, work],
            part=lambda: next((path.stem for path in work.glob("*.partial")), _OUTSIDE),
            library=folder.parent.absolute() / "reads.so",
            accepted=(0, EXIT_CHECK_FAILED),  # random weights give texts that fail the gate
        )
        peak_held = None if group is None else group.peak_bytes
    report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    whole = Part(
        "all",
        cost.seconds,
        cost.peak_process,
        cost=cost,
        peak_disk=watched.peak_disk,
        source_reads=sum(watched.reads.values()),
    )
    figures = _figures(report, out)
    shutil.rmtree(out)
    return Side([whole, *_parts(report, watched, cost.seconds)], figures, peak_held)


def _parts(report: Mapping[str, Any], watched: Watched, seconds: float) -> list[Part]:
    timings, peaks = report["timings"], report["peak_rss_bytes"]
    parts = [Part(name, timings[name], peaks[name], source_reads=watched.reads.get(name, 0)) for name in timings]
    outside = sum(n_bytes for name, n_bytes in watched.reads.items() if name not in timings)
    return [*parts, Part(_OUTSIDE, seconds - sum(timings.values()), None, source_reads=outside)]


def _figures(report: Mapping[str, Any], out: Path) -> Figures:
    rows = {row["artifact"]: row for row in report["validation"]}
    row = rows["gguf"]
    (file,) = out.glob("*.gguf")
    original = row["perplexity_teacher"]
    return Figures(file.stat().st_size, original, row["perplexity"], row["kld"]["mean"], row["top1_agreement"])
