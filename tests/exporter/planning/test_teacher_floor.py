"""The original, unquantized, in the runtimes: how much of it fits, and that the stages measure just that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.model.files.storage_type import StorageType
from compressors.model.predictions.routing_record import RoutingRecord
from compressors.model.running.memory import PROCESS_BYTES
from compressors.model.sources.opening import open_source
from exporter.estimating.budget import predict
from exporter.file_names import COST, EVALUATION, ROUTING
from exporter.planning.job import Flags
from exporter.planning.plan import Plan
from exporter.planning.plan_making import make_plan
from exporter.planning.recipe import FileChoice, Recipe
from exporter.planning.teacher_floor import TeacherFloor, choose_teacher_floor, exact_type
from exporter.stages.inputs import token_blocks
from exporter.stages.table import CALIBRATE, TEACHER_GGUF, TEACHER_ONNX
from exporter.work.directory import WorkDirectory
from tests.altered import altered
from tests.exporter.stage_runs import run_stage
from validate.metrics.evaluation import Evaluation
from validate.metrics.floors import floor_figures

pytestmark = pytest.mark.usefixtures("torch_left_as_it_was")

_PLENTY = 10**15
_STAGES = {"gguf": TEACHER_GGUF, "onnx": TEACHER_ONNX}


@pytest.fixture(scope="module")
def plan(toy_model: Path, small_texts: tuple[Path, Path]) -> Plan:
    """Two layers, whose original fits; two held-out chunks of each of two files."""
    calibration, text = small_texts
    choices = {"budget": "90MB", "budget_kind": "file", "quant": "Q4_0", "context": 512, "threads": 1, "floors": True}
    job = Flags(model=str(toy_model), calibration=calibration, text=text, recover="none", **choices).job()
    plan = make_plan(job, "moe-export")
    recipe = plan.recipe.model_dump()
    recipe["text"] |= {"calibration_blocks": 1, "selection_blocks": 1, "heldout_chunks_per_file": 2}
    return replace(plan, recipe=Recipe.model_validate(recipe))


@pytest.fixture(scope="module")
def work(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    """A work directory with the teacher's pass done."""
    work = WorkDirectory(tmp_path_factory.mktemp("floor"))
    run_stage(CALIBRATE, plan, work)
    return work


def test_what_fits_is_measured_whole(plan: Plan) -> None:
    for artifact, weight_type in (("gguf", "BF16"), ("onnx", "F32")):
        floor = plan.teacher_floors[artifact]
        assert (floor.weight_type, floor.n_layers) == (weight_type, 2)


def test_numbers_of_every_dtype_are_held_exactly() -> None:
    formats = (StorageType.BF16, StorageType.F16, StorageType.F32)
    found = {(a, stored): exact_type(a, stored) for a in ("gguf", "onnx") for stored in formats}
    assert found.pop(("gguf", StorageType.BF16)) == "BF16"
    assert set(found.values()) == {"F32"}


@pytest.mark.parametrize("artifact", ["gguf", "onnx"])
def test_as_many_layers_are_taken_as_half_of_memory_and_disk_hold(plan: Plan, fine_folder: Path, artifact: str) -> None:
    source = open_source(fine_folder)
    budget = plan.recipe.budget.model_copy(update={"context": 512})
    weight_type = "BF16" if artifact == "gguf" else "F32"

    def needed(n_layers: int) -> tuple[int, int]:
        shape = altered(source.spec, n_layers=n_layers)
        found = predict(artifact, source, plan.recipe.source.model, shape, FileChoice(mix=weight_type), budget, 1)
        return 2 * (PROCESS_BYTES + found.total), 2 * found.file

    def chosen(memory_bytes: int, disk_bytes: int) -> int | None:
        floor = choose_teacher_floor(artifact, source, plan.recipe, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
        return None if floor is None else floor.n_layers

    assert chosen(_PLENTY, _PLENTY) == 6
    for n_layers in (1, 4, 6):
        memory, disk = needed(n_layers)
        assert chosen(memory, _PLENTY) == chosen(_PLENTY, disk) == n_layers
        assert chosen(memory - 2, _PLENTY) == chosen(_PLENTY, disk - 2) == (n_layers - 1 or None)
    assert chosen(_PLENTY, -1) is None


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("artifact", ["gguf", "onnx"])
def test_the_runtime_does_what_torch_does(
    plan: Plan,
    work: WorkDirectory,
    tmp_path: Path,
    toy_checkpoint: Callable[..., Path],
    artifact: str,
    n_layers: int,
) -> None:
    """Whole and cut off, on chunks of both files; what is left is the runtime's arithmetic, in F32 nearly nothing."""
    weight_type = plan.teacher_floors[artifact].weight_type
    floor = TeacherFloor(weight_type, n_layers, 2, plan.teacher_floors[artifact].file_bytes)
    planned = replace(plan, teacher_floors={artifact: floor})
    here = WorkDirectory(tmp_path / "work")
    here.folder.mkdir()
    here.stage("calibrate").symlink_to(work.stage("calibrate"))
    folder = run_stage(_STAGES[artifact], planned, here)
    assert {path.name for path in folder.iterdir()} == {file.name for file in (EVALUATION, ROUTING, COST)}, (
        "the original is removed again"
    )
    cost = json.loads(COST.within(folder).read_text())
    if n_layers == 2:
        assert cost["decode_tokens_per_second"] > 0
    else:
        assert cost is None, "a part of the original has no speed that says anything"
    figures = floor_figures(
        Evaluation.load(EVALUATION.within(folder)), "teacher", RoutingRecord.load(ROUTING.within(folder))
    )
    limits = {"gguf": (3e-4, 0.995), "onnx": (1e-5, 0.9999)}[artifact]
    assert abs(figures["kld"]["mean"]) < limits[0]
    assert figures["routing"]["overlap"] > limits[1]
    tokens = token_blocks(work).heldout[[1, 3]]
    model = plan.source if n_layers == 2 else toy_checkpoint(tmp_path, n_layers=1)
    assert figures["chunks"] == 2
    assert figures["perplexity_torch"] == pytest.approx(_stock_perplexity(model, tokens), rel=2e-5)


@torch.no_grad()
def _stock_perplexity(folder: Path, tokens_BT: torch.Tensor) -> float:
    """The perplexity of the second halves, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    log_probs = model(tokens_BT).logits.log_softmax(-1)
    scored = log_probs[:, 256:511].gather(-1, tokens_BT[:, 257:512, None])
    return float((-scored.double().mean()).exp())
