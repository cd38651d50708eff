"""The parts of a run: what a repeated search found takes the place of what an earlier one found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.file_names import FOUND
from exporter.pipeline.parts import Part, found_parts, save_plans
from exporter.planning.job import Flags
from exporter.planning.plan_making import make_plan
from exporter.publishing.deviations import Deviation
from exporter.work.directory import WorkDirectory


@pytest.fixture(scope="module")
def searched(toy_model: Path, small_texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Part:
    """A run of one file whose search stage is a folder without its result."""
    calibration, text = small_texts
    out = tmp_path_factory.mktemp("parts") / "out"
    flags = Flags(
        model=str(toy_model), calibration=calibration, text=text, budget="3.4MB", budget_kind="file", formats="gguf"
    )
    job = replace(flags, out=out, threads=1, context=512).job()
    work = WorkDirectory(job.work_dir)
    work.stage("search").mkdir(parents=True)
    return Part("", make_plan(job, "moe-export"), work)


def _find(part: Part, quantizer: str) -> Part:
    """Writes a result as the search does, and returns the part that it leads to."""
    recipe = part.plan.recipe.model_dump()
    recipe["gguf"]["quantizer"] = quantizer
    entry = {"name": "gguf", "recipe": recipe, "refused_rungs": []}
    part.work.path("search", FOUND).write_text(json.dumps({"parts": [entry]}), encoding="utf-8")
    (found,) = found_parts(part)
    return found


def test_stages_read_the_plan_of_the_last_search(searched: Part) -> None:
    for quantizer in ("feedback", "kernel"):
        found = _find(searched, quantizer)
        save_plans([found])
        assert found.work.plan().recipe.gguf.quantizer == quantizer


def test_a_part_names_the_differences_of_its_own_file_alone(searched: Part) -> None:
    both = (Deviation("gguf", "llama.cpp cuts text otherwise"), Deviation("onnx", "the graph rounds"))
    found = _find(replace(searched, plan=replace(searched.plan, deviations=both)), "feedback")
    assert found.plan.deviations == both[:1]


def test_a_plan_that_is_kept_is_written_the_same_again(searched: Part) -> None:
    found = _find(searched, "feedback")
    save_plans([found])
    kept = found.work.plan_path.read_bytes()
    save_plans([replace(found, plan=found.work.plan())])
    assert found.work.plan_path.read_bytes() == kept
