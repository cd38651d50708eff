"""The stage in which the original writes texts: what the process that drafts them takes comes off its memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressors.model.running.memory import MemoryLimit
from exporter.file_names import GENERATION, TEXT_EFFORT
from exporter.planning.job import Flags
from exporter.planning.plan_making import make_plan
from exporter.planning.recipe import Recipe
from exporter.stages.table import CALIBRATE, COMPRESS, GGUF, RECOVER, SCHEDULING, TEACHER_TEXTS
from exporter.stages.teacher import texts
from exporter.work.directory import WorkDirectory
from tests.exporter.stage_runs import run_stage

pytestmark = pytest.mark.usefixtures("torch_left_as_it_was")


def test_memory_is_shared_with_the_process_that_drafts(
    tmp_path: Path, toy_model: Path, small_texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, text = small_texts
    choices = {"budget": "90MB", "budget_kind": "file", "context": 512, "threads": 1, "recover": "none"}
    choices |= {"formats": "gguf", "quant": "Q8_0", "quantizer": "kernel"}
    plan = make_plan(Flags(model=str(toy_model), calibration=calibration, text=text, **choices).job(), "moe-export")
    recipe = plan.recipe.model_dump()
    recipe["text"] |= {"calibration_blocks": 3, "selection_blocks": 1, "heldout_chunks_per_file": 1}
    plan = replace(plan, recipe=Recipe.model_validate(recipe))
    work = WorkDirectory(tmp_path)
    for stage in (CALIBRATE, COMPRESS, SCHEDULING, RECOVER, GGUF):
        run_stage(stage, plan, work)
    limits: list[MemoryLimit] = []
    drafters: list[texts.Drafter] = []
    really_streamed, really_drafting = texts.StreamedModel, texts.Drafter

    def streamed(*model: Any, limit: MemoryLimit, **choices: Any) -> Any:
        limits.append(limit)
        return really_streamed(*model, limit=limit, **choices)

    def drafting(*file: Any, **choices: Any) -> texts.Drafter:
        drafters.append(really_drafting(*file, **choices))
        return drafters[-1]

    monkeypatch.setattr(texts, "StreamedModel", streamed)
    monkeypatch.setattr(texts, "Drafter", drafting)
    written = []
    for memory_bytes in (plan.memory_bytes, 10**6):  # the second is less than what the drafts take
        folder = run_stage(TEACHER_TEXTS, replace(plan, memory_bytes=memory_bytes), work)
        written.append(json.loads(GENERATION.within(folder).read_text(encoding="utf-8")))
        effort = json.loads(TEXT_EFFORT.within(folder).read_text(encoding="utf-8"))
        assert effort["drafting_ended"] is None and effort["passes"] < 64
        assert drafters[-1].own_bytes > 10_000_000
        assert limits[-1].n_bytes == memory_bytes - drafters[-1].own_bytes
    assert written[0] == written[1]
