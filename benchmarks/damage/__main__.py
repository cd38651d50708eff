"""``make damage``: the whole grid of damaged files, and whole files that must pass. Writes ``results/damage.md``.

python -m benchmarks.damage [--files gguf:Q8_0 --files onnx:F32 ...]
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click

from benchmarks.damage.grid import grid
from benchmarks.damage.whole_files import Whole, whole_files
from benchmarks.damage.workshop import Outcome, Result
from exporter.hub import resolve_model

_RESULTS = Path(__file__).parents[1] / "results" / "damage.md"
_MODELS = {"fine": resolve_model(None), "coarse": Path(__file__).parents[2] / "tests" / "fixtures" / "coarse"}
_FILES = ("gguf:Q8_0", "gguf:Q4_0", "onnx:F32", "onnx:Q4_0")


@click.command()
@click.option("--files", multiple=True, default=_FILES, show_default=True, help="FORMAT:TYPE")
@click.option("--write/--no-write", default=True, show_default=True)
def main(files: Sequence[str], write: bool) -> None:
    """Measures, prints and writes the results."""
    with tempfile.TemporaryDirectory(prefix="moe-export-damage-") as folder:
        wholes = []
        for whole in whole_files(Path(folder) / "whole", _MODELS):
            wholes.append(whole)
            if whole.symptoms:
                print(f"FALSE ALARM {whole.what}: {whole.symptoms[0]}", flush=True)
        results = []
        for result in grid(Path(folder) / "grid", files):
            results.append(result)
            if result.outcome is not Outcome.NAMED:
                print(f"{result.outcome.value}: {result.file}, {result.what}: {result.said}", flush=True)
    text = "\n".join(_report(results, wholes)) + "\n"
    print(text)
    if write:
        _RESULTS.write_text(text, encoding="utf-8")


def _report(results: Sequence[Result], wholes: Sequence[Whole]) -> Iterator[str]:
    yield "# Damaged files: what the static checks of `moe-export validate` find"
    yield ""
    yield "`make damage`. The original is `fine` cut to its first two layers; every file is damaged in one place. Found"
    yield "and named: a check fails, and a symptom names the tensor, token or setting, or the file is refused by it."
    yield ""
    yield "| file | kind | damages | found and named | found | missed |"
    yield "|---|---|---|---|---|---|"
    yield from _rows(results)
    named = sum(result.outcome is Outcome.NAMED for result in results)
    yield ""
    yield f"All: {named} of {len(results)} found and named ({100 * named / max(1, len(results)):.1f} %)."
    yield ""
    rest = [result for result in results if result.outcome is not Outcome.NAMED]
    if rest:
        yield "Not found, or not named:"
        yield ""
        yield from (f"* {result.file}, {result.what}: {result.outcome.value}" for result in rest)
        yield ""
    alarms = [whole for whole in wholes if whole.symptoms]
    yield f"Whole files that must pass: {len(wholes)}, false alarms: {len(alarms)}."
    yield ""
    yield from (f"* {whole.what}{': ' + whole.symptoms[0] if whole.symptoms else ''}" for whole in wholes)


def _rows(results: Iterable[Result]) -> Iterator[str]:
    counts: dict[tuple[str, str], Counter[Outcome]] = {}
    for result in results:
        counts.setdefault((result.file, result.kind), Counter())[result.outcome] += 1
    for (file, kind), count in counts.items():
        numbers = [count.total(), count[Outcome.NAMED], count[Outcome.FOUND], count[Outcome.MISSED]]
        yield f"| {file} | {kind} | {' | '.join(map(str, numbers))} |"


if __name__ == "__main__":
    main()
