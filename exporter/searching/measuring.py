"""Measures a candidate file: writes it into a temporary folder, reads it back, and judges it in torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.weights import WrittenWeights
from exporter.planning.recipe import FileChoice
from exporter.searching.trial import Trial
from exporter.stages.files.writers import write_gguf_file, write_onnx_folder
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
        weights: WrittenWeights
        if artifact == "gguf":
            weights = GgufWeights(write_gguf_file(context, student, choice, folder), student.spec)
        else:
            weights = OnnxWeights(write_onnx_folder(context, student, choice, folder), student.spec)
        divergence = trial.judged(student.as_written(weights))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_atomically(path, json.dumps([*known, [key, divergence]]))
    return divergence
