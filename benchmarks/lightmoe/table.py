"""The table: ``lightmoe.csv`` holds all figures, ``lightmoe.md`` shows them beside the published claims."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean, stdev

from benchmarks.lightmoe.arms import COARSER, LIGHT, NO_ANNEAL, NO_GROUPING, NO_SELECTION, PLAIN, REAP_BY_CHANGE
from benchmarks.lightmoe.measure import HELDOUT_CHUNKS, TRAINING_BLOCKS, Measured
from benchmarks.quality.table import Difference, csv_text

__all__ = ["beside", "found", "write_csv", "write_markdown"]

_EXPLANATION = f"""\
# Replaced experts (LightMoE) beside pruned, merged, narrower and coarser ones

Two small models lose 30 % and 50 % of their experts' bytes (*removed*: values, as counted). Every arm that is trained
sees the same {TRAINING_BLOCKS} blocks of 512 tokens, once, and is taught by distillation: experts at 1e-3, those of
students that start well (LightMoE, SlimWidth, *{REAP_BY_CHANGE}*) at 3e-4, routers alone at
3e-3. *KL* is the mean divergence from the original over the full vocabulary, in nats, of the second halves of
{HELDOUT_CHUNKS} held-out chunks of 512 tokens, five domains, in float32; *against LightMoE* is an arm's KL minus that
of the trained LightMoE student, with two standard errors of the paired difference over the chunks. Plain replacing has
neither selection nor anneal: each layer
replaces as many, the first by number. REAP and REAM keep as many experts in each layer, *{REAP_BY_CHANGE}* as many as
LightMoE's rule for the layers leaves. Adapters have rank 8 (fine) and 16 (coarse), and a base stands
under sixteen experts, or all of a layer's. *{COARSER}* keeps every expert at 5.5 or 4.25 bits, 65 % or 50 % of the 8.5
bits that the others would be stored at. An arm that stands in no table was not run. Written by `make lightmoe`.
"""


def write_csv(results: Iterable[Measured], path: Path) -> None:
    """Writes all results; the chunks' divergences are in one column, between blanks."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measured)])
        writer.writeheader()
        for result in results:
            row = {name: csv_text(value) for name, value in asdict(result).items()}
            writer.writerow(row | {"chunk_divergences": " ".join(f"{value:.5g}" for value in result.chunk_divergences)})


def write_markdown(results: Sequence[Measured], path: Path, shares: Sequence[float]) -> None:
    """Writes the explanation, the claims and, for each model and share, a table from the least divergence."""
    models = list(dict.fromkeys(result.model for result in results))
    lines = [*_EXPLANATION.splitlines(), "", *_claims(results, models, shares)]
    for share in shares:
        for model in models:
            lines += ["", f"## {model}, {share:.0%} of the experts' bytes", "", *_table(results, model, share)]
    lines += ["", "![divergence of every arm](lightmoe.png)"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def found(results: Sequence[Measured], model: str, share: float) -> list[Measured]:
    """One model's results at one share, from the least divergence."""
    chosen = [result for result in results if (result.model, result.share) == (model, share)]
    return sorted(chosen, key=lambda result: result.divergence)


def beside(result: Measured, other: Measured) -> Difference:
    """A result's difference from another's, chunk by chunk: below 0 is better."""
    differences = [own - its for own, its in zip(result.chunk_divergences, other.chunk_divergences, strict=True)]
    return Difference(mean(differences), 2 * stdev(differences) / len(differences) ** 0.5)


def _table(results: Sequence[Measured], model: str, share: float) -> list[str]:
    chosen = found(results, model, share)
    light = _named(chosen, LIGHT)
    lines = ["| arm | removed | perplexity | KL | against LightMoE | training, CPU s |", "|" + "---|" * 6]
    for result in chosen:
        name = f"**{result.arm}**" if result is light else result.arm
        compared = "-" if result is light else _shown(beside(result, light))
        gone = "bits" if result.arm.startswith(COARSER) else f"{result.removed:.1%}"
        cells = [name, gone, f"{result.perplexity:.2f}", f"{result.divergence:.4f}", compared, f"{result.seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _claims(results: Sequence[Measured], models: Sequence[str], shares: Sequence[float]) -> list[str]:
    """Says of each claim, and of each part of the method, whether these figures confirm it."""
    low, high = min(shares), max(shares)
    lines = [f"* {_as_good_as_whole(results, models, low)}", f"* {_better_than_others(results, models, high)}"]
    parts = {NO_SELECTION: "selection", NO_GROUPING: "grouping", NO_ANNEAL: "the anneal", PLAIN: ""}
    for arm, part in parts.items():
        for share in shares:
            verdicts = []
            for model in models:
                chosen = found(results, model, share)
                if any(result.arm == arm for result in chosen):
                    difference = beside(_named(chosen, arm), _named(chosen, LIGHT))
                    verdicts.append(f"{_shown(difference)} on {model}")
            if verdicts:
                what = "Plain replacing against the whole method" if arm == PLAIN else f"Without {part}"
                lines.append(f"* {what}, {share:.0%}: {', '.join(verdicts)}.")
    return lines


def _as_good_as_whole(results: Sequence[Measured], models: Sequence[str], share: float) -> str:
    figures = [f"{_named(found(results, model, share), LIGHT).divergence:.3f} on {model}" for model in models]
    return (
        f"Published: at {share:.0%}, as good as the uncompressed model after the same fine-tuning. Contradicted as far "
        f"as distance from the original tells: after training {' and '.join(figures)} nats are left."
    )


def _better_than_others(results: Sequence[Measured], models: Sequence[str], share: float) -> str:
    sides: dict[str, list[str]] = {"better": [], "level": [], "worse": []}
    for model in models:
        chosen = found(results, model, share)
        light = _named(chosen, LIGHT)
        for result in chosen:
            counts = result.arm.startswith(COARSER) or not result.arm.endswith("not trained")
            if counts and not result.arm.startswith((LIGHT, PLAIN)):
                sides[beside(result, light).verdict].append(f"{result.arm} ({model})")
    said = "Confirmed" if not sides["better"] and not sides["level"] else "Contradicted"
    listed = {verdict: ", ".join(names) or "none" for verdict, names in sides.items()}
    return (
        f"Published: at {share:.0%}, better than the other families after the same training. {said}: worse than "
        f"LightMoE by two standard errors are {listed['worse']}; level are {listed['level']}; better are "
        f"{listed['better']}."
    )


def _named(chosen: Sequence[Measured], arm: str) -> Measured:
    (result,) = (result for result in chosen if result.arm == arm)
    return result


def _shown(difference: Difference) -> str:
    return f"{difference.mean:+.3f} ± {difference.two_errors:.3f} {difference.verdict}"
