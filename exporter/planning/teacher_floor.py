"""Chooses how much of the unquantized original is measured in a runtime: once, from the machine, before any work.

It is measured only where somebody asks for it, as it costs another pass and its own size on the disk. The original is
written in a type that holds its numbers exactly, measured, and removed again. As many of its first layers are taken as
fit half of the memory that the run may use and half of the disk that it leaves free: all of them if they do.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError
from compressors.model.files.storage_type import StorageType
from compressors.model.running.memory import PROCESS_BYTES
from compressors.model.sources.source import Source
from compressors.model.sources.student import ExpertMap, Student
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refusal
from exporter.estimating.budget import predict
from exporter.estimating.prediction import Prediction
from exporter.planning.recipe import FileChoice, Recipe
from exporter.planning.resulting_spec import layers_with_experts

__all__ = ["TeacherFloor", "choose_teacher_floor", "exact_type", "first_layers"]

_CHUNKS = 10
_SHARE = 2  # half of memory and disk


@dataclass(frozen=True)
class TeacherFloor:
    """The part of the original that is written, and the most held-out chunks to measure it on."""

    weight_type: str
    n_layers: int  # the number of its first layers
    n_chunks: int
    file_bytes: int  # bytes on disk while it is measured


def choose_teacher_floor(
    artifact: str, checkpoint: Source, recipe: Recipe, *, memory_bytes: int, disk_bytes: int
) -> TeacherFloor | None:
    """Chooses how much of the original can be measured in a runtime; None if no layer fits or it cannot be held.

    Args:
        artifact: ``gguf`` or ``onnx``.
        checkpoint: the original.
        recipe: gives context, cache type and threads.
        memory_bytes: memory that the run may use.
        disk_bytes: space that the run leaves free on the disk of its work.
    """
    weight_type = exact_type(artifact, checkpoint.storage_type)

    def prediction(n_layers: int) -> Prediction:
        spec = _first_layers_map(checkpoint.spec, n_layers).spec_of(checkpoint.spec)
        name, threads = recipe.source.model, recipe.threads
        choice = FileChoice(mix=weight_type, quantizer="kernel")
        return predict(artifact, checkpoint, name, spec, choice, recipe.budget, threads)

    def is_too_large(n_layers: int) -> bool:
        found = prediction(n_layers)
        return PROCESS_BYTES + found.total > memory_bytes // _SHARE or found.file > disk_bytes // _SHARE

    fewest = _fewest_layers(checkpoint.spec, Container(artifact))
    if fewest is None:  # the student may be something else, such as fewer experts than llama.cpp's limit
        return None
    try:
        prediction(fewest)
    except UnsupportedError:  # by a setting, such as the type of the cache
        return None
    possible = range(fewest, checkpoint.spec.n_layers + 1)
    n_possible = bisect_left(possible, True, key=is_too_large)
    if n_possible == 0:
        return None
    n_layers = possible[n_possible - 1]
    return TeacherFloor(weight_type, n_layers, _CHUNKS, prediction(n_layers).file)


def _fewest_layers(spec: ModelSpec, container: Container) -> int | None:
    """The fewest first layers that a container holds; None: it does not even hold all of them.

    It need not hold a model without experts, or without a layer of some kind.
    """
    possible = range(layers_with_experts(spec)[0] + 1, spec.n_layers + 1)
    students = ((n_layers, _first_layers_map(spec, n_layers).spec_of(spec)) for n_layers in possible)
    return next((n_layers for n_layers, student in students if refusal(student, container) is None), None)


def exact_type(artifact: str, weights: StorageType) -> str:
    """The smallest type that holds numbers of this format exactly."""
    return "BF16" if artifact == "gguf" and weights is StorageType.BF16 else "F32"


def first_layers(source: Source, n_layers: int) -> Student:
    """The original with its first layers only, then final norm and head."""
    return Student(source, _first_layers_map(source.spec, n_layers))


def _first_layers_map(spec: ModelSpec, n_layers: int) -> ExpertMap:
    whole = ExpertMap.identity(spec)
    return replace(whole, layers=whole.layers[:n_layers])
