"""``make latent``: the whole run on a small trained GLM-4.7-Flash. Writes ``results/latent.md``; minutes.

    python -m benchmarks.latent [--model FOLDER] [--threads 1]

The model is the bundled one, which ``benchmarks/latent/model.py`` trained. Three of four experts go; routers are
taught, then experts; what is left is quantized and written to both containers, by the recipe that a dry run writes. The
exit code is 4 if a bar is not met.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from exporter.planning.flags import Flags
from exporter.planning.plan_making import make_plan
from exporter.planning.recipe import recipe_yaml
from exporter.progress.views import PlainLines
from exporter.run import run_job

__all__ = ["Bar", "bars", "markdown"]

_RESULTS = Path(__file__).parents[1] / "results" / "latent.md"
_MODEL = Path(__file__).parents[2] / "tests" / "fixtures" / "latent"
_COMMAND = "python -m benchmarks.latent"
_CHOICES: Mapping[str, Any] = {
    "budget": "1.3MB",
    "budget_kind": "file",
    "method": "reap",
    "experts": 8,
    "recover": "auto",
}


@dataclass(frozen=True)
class Bar:
    """A figure of the run, and the value that it must reach."""

    name: str
    value: float
    least: float

    @property
    def is_met(self) -> bool:
        """True if the value reaches it."""
        return self.value >= self.least


def bars(report: Mapping[str, Any]) -> Iterator[Bar]:
    """The bars of a run: routing and perplexity by the side of torch with the same numbers, and the gap closed."""
    for row in _files(report):
        floor = row["floor"]["same_weights"]
        yield Bar(f"{row['runtime']}: routing overlap", floor["routing"]["overlap"], 0.99)
        yield Bar(f"{row['runtime']}: 1 - change of perplexity", 1 - abs(floor["perplexity_ratio"] - 1), 0.995)
    yield Bar("recovery: gap closed", _gap_closed(report), 0.2)


def _files(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in report["validation"] if row["artifact"] in ("gguf", "onnx")]


def _gap_closed(report: Mapping[str, Any]) -> float:
    tried = [rung for rung in report["recovery"] if rung.get("selection_kld_after") is not None]
    kept = [float(rung["selection_kld_after"]) for rung in tried if rung["accepted"]]
    before = float(tried[0]["selection_kld_before"])
    return 1 - (kept[-1] if kept else before) / before


def markdown(report: Mapping[str, Any]) -> str:
    """The page."""
    teacher, student, *_ = report["validation"]
    sizes = {artifact["format"]: artifact["bytes"] for artifact in report["artifacts"]}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in _CHOICES.items())
    lines = [
        "# The whole run on a trained model with latent attention",
        "",
        "The model is a small GLM-4.7-Flash (`tests/fixtures/latent`, trained by `benchmarks/latent/model.py`): latent "
        "attention, a dense first layer, 32 experts of which each token takes 4, sigmoid scores, biases for the "
        f"choice, a shared expert. The run follows the recipe of `moe-export tests/fixtures/latent {flags} --dry-run`; "
        "`make latent` writes this page.",
        "",
        "| model | in | MB | perplexity | divergence from the original |",
        "|---|---|---:|---:|---:|",
        f"| the original | torch | {report['source']['bytes'] / 1e6:.2f} | {teacher['perplexity']:.3f} | 0 |",
        f"| 8 experts, taught | torch | - | {student['perplexity']:.3f} | {student['kld']['mean']:.4f} |",
        *(
            f"| the same, quantized | {row['runtime']} | {sizes[row['artifact']] / 1e6:.2f} | {row['perplexity']:.3f} "
            f"| {row['kld']['mean']:.4f} |"
            for row in _files(report)
        ),
        "",
        "What recovery did, by the divergence on the selection split:",
        "",
        "| taught | tokens | rate | before | after | kept |",
        "|---|---:|---:|---:|---:|---|",
        *(_rung_line(rung) for rung in report["recovery"]),
        "",
        "Each runtime beside torch with the numbers that its file holds:",
        "",
        "| runtime | perplexity | torch | divergence | same top token | routing overlap |",
        "|---|---:|---:|---:|---:|---:|",
        *(_floor_line(row) for row in _files(report)),
        "",
        "| bar | value | least | |",
        "|---|---:|---:|---|",
        *(
            f"| {bar.name} | {bar.value:.4f} | {bar.least:g} | {'met' if bar.is_met else 'missed'} |"
            for bar in bars(report)
        ),
    ]
    return "\n".join(lines) + "\n"


def _rung_line(rung: Mapping[str, Any]) -> str:
    cells = (
        *(rung["rung"], f"{rung['tokens']:,}", f"{rung['learning_rate']:g}"),
        *(f"{rung[key]:.4f}" for key in ("selection_kld_before", "selection_kld_after")),
        "yes" if rung["accepted"] else "no",
    )
    return f"| {' | '.join(cells)} |"


def _floor_line(row: Mapping[str, Any]) -> str:
    floor = row["floor"]["same_weights"]
    cells = (
        row["runtime"],
        *(f"{floor[key]:.4f}" for key in ("perplexity", "perplexity_torch")),
        f"{floor['kld']['mean']:.1e}",
        *(f"{100 * share:.2f} %" for share in (floor["top1_agreement"], floor["routing"]["overlap"])),
    )
    return f"| {' | '.join(cells)} |"


@click.command()
@click.option("--model", type=click.Path(path_type=Path), default=_MODEL, show_default="the bundled one")
@click.option("--threads", default=1, show_default=True)
def main(model: Path, threads: int) -> None:
    """Runs, writes the page, and judges."""
    with tempfile.TemporaryDirectory() as folder:
        common = {"model": str(model), "out": Path(folder) / "out", "threads": threads}
        plan = make_plan(Flags(**common, **_CHOICES).job(), _COMMAND)
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(recipe_yaml(plan.recipe), encoding="utf-8")
        view = PlainLines(lambda text: print(text, flush=True))
        report = run_job(Flags(**common, recipe=recipe).job(), _COMMAND, view).report
    _RESULTS.write_text(markdown(report), encoding="utf-8")
    missed = [bar for bar in bars(report) if not bar.is_met]
    for bar in missed:
        print(f"missed: {bar.name}: {bar.value:.4f}, at least {bar.least:g}", file=sys.stderr)
    raise SystemExit(4 if missed or not report["verdict"]["passed"] else 0)


if __name__ == "__main__":
    main()
