"""The stage that gathers sensitivities: the same files however often it was begun, under any memory limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from exporter.planning.job import Flags
from exporter.planning.plan_making import make_plan
from exporter.planning.recipe import Recipe
from exporter.stages.table import CALIBRATE, SENSITIVITY
from exporter.work.directory import WorkDirectory
from exporter.work.stage import Stage
from tests.exporter.stage_runs import run_stage

pytestmark = pytest.mark.usefixtures("torch_left_as_it_was")


def test_an_attempt_that_was_killed_is_begun_anew(
    tmp_path: Path, toy_model: Path, small_texts: tuple[Path, Path]
) -> None:
    calibration, text = small_texts
    choices = {"budget": "90MB", "budget_kind": "file", "context": 512, "threads": 1, "recover": "none"}
    plan = make_plan(Flags(model=str(toy_model), calibration=calibration, text=text, **choices).job(), "moe-export")
    recipe = plan.recipe.model_dump()
    recipe["text"] |= {"calibration_blocks": 3, "selection_blocks": 1, "heldout_chunks_per_file": 1}
    plan = replace(plan, recipe=Recipe.model_validate(recipe))
    work = WorkDirectory(tmp_path)

    def run(stage: Stage, memory_bytes: int = plan.memory_bytes) -> Path:
        return run_stage(stage, replace(plan, memory_bytes=memory_bytes), work)

    run(CALIBRATE)
    first = {file.name: file.read_bytes() for file in run(SENSITIVITY).iterdir() if file.is_file()}
    assert sorted(first) == ["layer-000.safetensors", "layer-001.safetensors", "vocabulary.safetensors"]
    (work.stage("sensitivity") / "layer-000.safetensors").write_bytes(b"cut off")
    (work.stage("sensitivity") / "vocabulary.safetensors").unlink()
    again = {file.name: file.read_bytes() for file in run(SENSITIVITY, 10**6).iterdir() if file.is_file()}
    assert again == first
