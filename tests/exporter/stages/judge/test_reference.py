"""The student in torch: one that is the original is known from calibration, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.file_names import EVALUATION, HELDOUT_PREDICTIONS
from exporter.planning.job import Flags
from exporter.planning.plan import Plan
from exporter.planning.plan_making import make_plan
from exporter.planning.recipe import Recipe
from exporter.stages.inputs import teacher_predictions, token_blocks
from exporter.stages.table import CALIBRATE, COMPRESS, VALIDATE_TORCH
from exporter.work.directory import WorkDirectory
from tests.exporter.stage_runs import run_stage
from validate.metrics.evaluation import Evaluation, evaluate
from validate.runtimes.torch import TorchBackend

pytestmark = pytest.mark.usefixtures("torch_left_as_it_was")


@pytest.fixture(scope="module")
def plan(toy_model: Path, small_texts: tuple[Path, Path]) -> Plan:
    """The whole toy, and as little text as possible."""
    calibration, text = small_texts
    choices = {"budget": "90MB", "budget_kind": "file", "quant": "Q4_0", "context": 512, "threads": 1}
    job = Flags(model=str(toy_model), calibration=calibration, text=text, recover="none", **choices).job()
    plan = make_plan(job, "moe-export")
    recipe = plan.recipe.model_dump()
    recipe["text"] |= {"calibration_blocks": 1, "selection_blocks": 1, "heldout_chunks_per_file": 1}
    return replace(plan, recipe=Recipe.model_validate(recipe))


def test_a_student_that_is_the_original_is_not_run(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = WorkDirectory(tmp_path)
    for stage in (CALIBRATE, COMPRESS):
        run_stage(stage, plan, work)
    teacher = Student.teacher(open_source(plan.source))
    known = {"teacher": teacher_predictions(plan, work, HELDOUT_PREDICTIONS)}
    expected = evaluate(TorchBackend(teacher), token_blocks(work).heldout.numpy(), known)
    monkeypatch.delattr(TorchBackend, "run")
    found = Evaluation.load(run_stage(VALIDATE_TORCH, plan, work) / EVALUATION.name)
    for name, values in vars(expected.against["teacher"]).items():  # which were compared in 16 bits
        np.testing.assert_allclose(vars(found.against["teacher"])[name], values, atol=16 / 65535, err_msg=name)
    np.testing.assert_array_equal(found.negative_log_likelihood_N, expected.negative_log_likelihood_N)
    assert found.routing is not None and expected.routing is not None
    for name, values in vars(expected.routing).items():
        np.testing.assert_array_equal(vars(found.routing)[name], values, err_msg=name)
    assert (found.against["teacher"].kl_divergence_N == 0).all()
