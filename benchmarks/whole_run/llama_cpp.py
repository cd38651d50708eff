"""Their side: llama.cpp's converter, importance matrix, quantizer, and perplexity with divergence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.export.llama_cpp import PATIENCE_SECONDS, Tools, patience
from benchmarks.whole_run.table import Figures, Part
from benchmarks.whole_run.texts import Texts
from benchmarks.whole_run.watched import run_watched
from compressors.calibration.splits import BLOCK_LENGTH

__all__ = ["run_tools"]

_NUMBER = r"(-?[\d.]+)"


def run_tools(
    tools: Tools,
    source: Path,
    texts: Texts,
    folder: Path,
    quant: str,
    threads: int,
    announce: Callable[[Part], None],
) -> tuple[list[Part], Figures]:
    """Runs the tools one after the other: the cost of each, and the last one's figures.

    Args:
        tools: their commands.
        source: the checkpoint.
        texts: what both sides read.
        folder: for their files, an empty folder.
        quant: a mix of llama-quantize.
        threads: of each tool.
        announce: is told the cost of each tool as soon as it has ended.
    """
    original, written, matrix = folder / "original.gguf", folder / "written.gguf", folder / "imatrix.gguf"
    logits = folder / "original.kld"
    common: list[str | Path] = ["-c", str(BLOCK_LENGTH), "-t", str(threads)]
    measure: list[str | Path] = [*tools.perplexity, *common, "-f", texts.heldout, "--kl-divergence-base", logits]
    commands: dict[str, list[str | Path]] = {
        "convert_hf_to_gguf": [*tools.convert, source, "--outfile", original, "--outtype", "bf16"],
        "llama-imatrix": [*tools.imatrix, *common, "-m", original, "-f", texts.statistics, "-o", matrix, "--no-ppl"],
        "llama-quantize": [*tools.quantize, "--imatrix", matrix, original, written, quant, str(threads)],
        "llama-perplexity, original": [*measure, "-m", original],
        "llama-perplexity, file": [*measure, "-m", written, "--kl-divergence"],
    }
    parts, printed = [], ""
    for name, command in commands.items():
        waits = command[: len(tools.perplexity)] == list(tools.perplexity)
        environment = {"OMP_NUM_THREADS": str(threads)}
        environment |= {"LD_PRELOAD": str(patience(folder.parent))} if waits else {}
        cost, watched, printed = run_watched(
            command,
            environment,
            source=source,
            folders=[folder],
            part=lambda: "",
            library=folder.parent.absolute() / "reads.so",
        )
        if waits:
            cost = replace(cost, seconds=cost.seconds - PATIENCE_SECONDS)
        parts.append(Part(name, cost.seconds, cost.peak_process, cost=cost, peak_disk=watched.peak_disk))
        announce(parts[-1])
    return parts, _figures(printed, written.stat().st_size)


def _figures(printed: str, n_bytes: int) -> Figures:
    original, written, divergence, top1 = (
        float(_found(pattern, printed))
        for pattern in (r"Mean PPL\(base\)\s*:", r"Mean PPL\(Q\)\s*:", r"Mean\s+KLD:", r"Same top p:")
    )
    return Figures(n_bytes, original, written, divergence, top1 / 100)


def _found(name: str, printed: str) -> str:
    found = re.search(rf"{name}\s*{_NUMBER}", printed)
    if found is None:
        raise SystemExit(f"llama-perplexity does not print {name}:\n{printed}")
    return found[1]
