"""The students that are trained: the two trained models after compression."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.quality.methods import ARMS as COMPRESSIONS
from benchmarks.quality.methods import Teacher
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.shrink.condense import Condense
from compressors.shrink.dense import dense_size
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from exporter.writing.files import write_atomically

__all__ = [
    "ALL_EXPERTS_ON",
    "DENSE",
    "EDITED",
    "MERGED",
    "PRUNED",
    "STUDENTS",
    "UNCHANGED",
    "load_student",
    "store_student",
]

PRUNED, MERGED, EDITED = "pruned", "merged", "edited"
DENSE = "dense"
UNCHANGED = "teacher"
ALL_EXPERTS_ON = "teacher, all experts on"
"""The teacher with which SAR starts, and nearly that of KA."""

_EDITED_SHARE = 0.85
"""Share of the expert parameters that the decomposition removes: a half hardly harms, and nothing could be won back."""


def _compressed(method: str, share: float = 0.5) -> Callable[[Teacher], Student]:
    return lambda teacher: COMPRESSIONS[method].build(teacher, share).student


def _dense(teacher: Teacher) -> Student:
    spec = teacher.spec
    targets = [LayerTarget(layer, dense_size(spec), (Condense(),)) for layer in range(spec.n_layers)]
    layers: list[LayerMap] = []
    overlay = {}
    for layer in LayerwiseCompression(
        teacher.source, targets, teacher.statistics, teacher.tokens_BT, n_sample_blocks=0
    ).run():
        layers.append(layer.map)
        overlay |= layer.overlay
    return Student(teacher.source, ExpertMap(spec.n_experts, tuple(layers))).with_overlay(overlay)


STUDENTS: Mapping[str, Callable[[Teacher], Student]] = {
    **dict.fromkeys((UNCHANGED, ALL_EXPERTS_ON), lambda teacher: Student.teacher(teacher.source)),
    PRUNED: _compressed("reap"),
    MERGED: _compressed("REAM"),
    EDITED: _compressed("activation SVD", _EDITED_SHARE),
    DENSE: _dense,
}


def store_student(student: Student, folder: Path) -> None:
    """Writes expert map and overlay."""
    folder.mkdir(parents=True, exist_ok=True)  # a killed run may have begun it
    save_file(dict(student.overlay), folder / "overlay.safetensors")
    write_atomically(folder / "map.json", json.dumps(student.experts.to_json()))


def load_student(source: Source, folder: Path) -> Student:
    """The inverse of :func:`store_student`."""
    return Student.load(source, folder / "map.json", [folder / "overlay.safetensors"])
