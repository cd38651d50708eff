"""A plan: the recipe, the places of its inputs, and the predictions of its artifacts. Stages read nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from compressors.calibration.mixture import WeightedText
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.opening import open_source
from compressors.model.sources.source import Source
from exporter.estimating.prediction import Prediction
from exporter.planning.compression import expected_spec
from exporter.planning.recipe import Recipe
from exporter.planning.recovery import RefusedRung
from exporter.planning.teacher_floor import TeacherFloor
from exporter.publishing.deviations import Deviation
from exporter.writing.files import write_atomically

__all__ = ["Plan", "Search"]


@dataclass(frozen=True)
class Search:
    """The command line's choices for a recipe that measurements will decide."""

    method: str
    experts: int | None
    student: str
    recover: str
    prefer: str  # speed or quality
    plan_seconds: int
    removed_share: float | None = None  # of the experts' values, by replacing them; None: any
    materialize: bool = False  # what replaces experts is multiplied out


@dataclass(frozen=True)
class Plan:
    """Everything a stage needs to know; kept in the work directory as JSON."""

    recipe: Recipe
    source: Path  # the place of the original
    calibration: tuple[WeightedText, ...]
    heldout: Path | None
    predictions: Mapping[str, Prediction]  # by artifact
    recover_seconds: int
    refused_rungs: tuple[RefusedRung, ...]  # rungs of recovery that this machine cannot train
    memory_bytes: int
    device: str  # cpu or cuda: where calibration and recovery compute
    require: Mapping[str, float]  # thresholds that differ from the default
    out: Path
    command: str  # the command as it was typed, for the report
    teacher_floors: Mapping[str, TeacherFloor] = field(
        default_factory=dict
    )  # by artifact; absent: not asked for, or nothing fits
    end_tokens: tuple[int, ...] = ()  # of the source: each ends a text
    deviations: tuple[Deviation, ...] = ()  # of the files from the original, which no file can avoid
    may_choose_codes: bool = False  # error feedback may choose codes, in a recipe that a search finds
    may_train: bool = False  # recovery may train, in a recipe that a search finds
    may_judge: bool = False  # a search judges what it finds
    imatrix: Path | None = None  # llama.cpp's importance matrix, in place of the calibration text's
    shard_bytes: int | None = None  # largest part of a GGUF file in OUT; None: it is not cut
    search: Search | None = None  # how to find the recipe after calibration; None: the recipe stands
    mixture: str = ""  # the files that the calibration blocks come from, if there are several
    curve: Mapping[str, int] = field(default_factory=dict)  # bytes of the files that moe-export pareto compares

    def open_source(self) -> Source:
        """Opens the original, with those parts that the recipe keeps.

        Raises:
            InputError: it cannot be read.
        """
        return open_source(self.source, keeps_mtp=self.recipe.source.keep_mtp)

    @cached_property
    def teacher_spec(self) -> ModelSpec:
        """The source's shape."""
        return self.open_source().spec

    @property
    def student_spec(self) -> ModelSpec:
        """The model after compression; where statistics will decide which layers shrink, it assumes the last ones."""
        return expected_spec(self.recipe.compress, self.teacher_spec)

    @property
    def keeps_layer_inputs(self) -> bool:
        """True if calibration keeps the inputs of layers: the second moments of error feedback are made of them."""
        return self.may_choose_codes or self.recipe.chooses_codes

    @property
    def keeps_targets(self) -> bool:
        """True if calibration keeps the teacher's most probable tokens: students are taught them."""
        return self.may_train or bool(self.recipe.recover.trained)

    @property
    def selection_blocks(self) -> int:
        """The blocks of selection text that calibration runs: none where no search and no training judges students."""
        return self.recipe.text.selection_blocks if self.may_judge or self.keeps_targets else 0

    def save(self, path: Path) -> None:
        """Writes the plan as JSON."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        data = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        data["recipe"] = self.recipe.model_dump()
        data["calibration"] = [[str(text.path), text.weight] for text in self.calibration]
        data["predictions"] = {name: asdict(prediction) for name, prediction in self.predictions.items()}
        data["refused_rungs"] = [asdict(refused) for refused in self.refused_rungs]
        data["search"] = None if self.search is None else asdict(self.search)
        data["deviations"] = [asdict(deviation) for deviation in self.deviations]
        data["teacher_floors"] = {name: asdict(floor) for name, floor in self.teacher_floors.items()}
        write_atomically(path, json.dumps(data, indent=1))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """The inverse of :meth:`save`."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data["recipe"] = Recipe.model_validate(data["recipe"])
        texts = data["calibration"]  # a path alone in plans of release 0.1
        pairs = [(texts, 1.0)] if isinstance(texts, str) else texts
        data["calibration"] = tuple(WeightedText(Path(path), weight) for path, weight in pairs)
        data["predictions"] = {name: Prediction(**lines) for name, lines in data["predictions"].items()}
        data["refused_rungs"] = tuple(RefusedRung(**refused) for refused in data["refused_rungs"])
        data["deviations"] = tuple(Deviation(**deviation) for deviation in data.get("deviations", ()))
        data["end_tokens"] = tuple(data.get("end_tokens", ()))
        data["teacher_floors"] = {name: TeacherFloor(**floor) for name, floor in data.get("teacher_floors", {}).items()}
        search = data.get("search")
        data["search"] = None if search is None else Search(**search)
        for name in ("source", "heldout", "out", "imatrix"):
            data[name] = None if data.get(name) is None else Path(data[name])
        return cls(**data)
