"""Measures a candidate file: writes it layer by layer into a temporary folder, and judges what it holds in torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

from exporter.planning.recipe import FileChoice
from exporter.searching.trial import Trial
from exporter.stages.files.writers import weights_by_layer
from exporter.writing.files import write_atomically

__all__ = ["measured_divergence"]


def measured_divergence(trial: Trial, artifact: str, choice: FileChoice) -> float:
    """The divergence of a trial's student with the numbers that a file would hold: nats, on the selection split.

    The result is kept in the trial's folder, so a resumed search does not measure it again.
    """
    path = trial.context.output / f"measured-{artifact}.json"
    known: list[list[object]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    key = choice.model_dump_json()
    for choice_json, divergence in known:
        if choice_json == key:
            return float(divergence)  # type: ignore[arg-type]
    student = trial.student()
    folder = trial.context.output / "removed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        context = replace(trial.context, output=folder)
        with (
            weights_by_layer(context, student, artifact, choice, folder) as weights,
            context.progress.bar("layers", student.spec.n_layers) as advance,
        ):

            def write(layer: int | None) -> None:
                weights.write(layer)
                advance(layer is not None)

            divergence = trial.judged(student.as_written(weights), write)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_atomically(path, json.dumps([*known, [key, divergence]]))
    return divergence
