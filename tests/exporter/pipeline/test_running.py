"""The choices that stages depend on; stages run in processes of their own and are not repeated without a reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressors.model.errors import InputError
from exporter.file_names import GGUF_FILE, LAYER_INPUTS, ONNX_FOLDER, ROUTER_INPUTS, ROUTING
from exporter.pipeline import running
from exporter.pipeline.order import fingerprints, search_stages, stages_of
from exporter.pipeline.running import StageError, run_stages, unfinished
from exporter.pipeline.stage_process import Outcome
from exporter.planning.job import Flags, Job
from exporter.planning.plan import Plan
from exporter.planning.plan_making import make_plan
from exporter.planning.recipe import Recipe
from exporter.progress.events import Event
from exporter.progress.run_progress import RunProgress
from exporter.progress.views import PlainLines, show_nothing
from exporter.run import run_job
from exporter.stages.table import COMPRESS, OF_THE_REPORT
from exporter.work.directory import StageRecord, UndeclaredFileError, WorkDirectory
from exporter.work.input_state import SourceState
from exporter.work.stage import Stage
from tests.exporter.stage_runs import run_stage

_FROM_COMPRESS = {"compress", "schedule", "recover", "gguf", "onnx", "student", "validate_torch"}
_RUNG = {"scope": "router", "blocks": 8, "blocks_per_step": 8, "learning_rate": 0.001}
_VALIDATIONS = {"validate_written", "validate_gguf", "validate_onnx"}
_ALL = {"calibrate", "sensitivity", "teacher_gguf", "teacher_onnx", "teacher_texts"} | _FROM_COMPRESS | _VALIDATIONS


@pytest.fixture(scope="module")
def plan(
    tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path], small_texts: tuple[Path, Path]
) -> Plan:
    """A whole plan of a small model of this module's own; nothing is pruned or taught."""
    model = toy_checkpoint(tmp_path_factory.mktemp("pipeline"), n_layers=1)
    job = _job(model, small_texts, save_student=True, floors=True)
    return make_plan(job, "moe-export")


def _job(model: Path, texts: tuple[Path, Path], **arguments: Any) -> Job:
    calibration, text = texts
    return Flags(
        **{"model": str(model), "budget": "90MB", "budget_kind": "file"} | arguments,
        calibration=calibration,
        text=text,
        context=512,
        threads=1,
    ).job()


def _edited(plan: Plan, **parts: Any) -> Plan:
    """The plan with parts of its recipe changed: ``_edited(plan, compress={"experts": 8})``."""
    recipe = plan.recipe.model_dump()
    for name, value in parts.items():
        recipe[name] = recipe[name] | value if isinstance(value, dict) else value
    return replace(plan, recipe=Recipe.model_validate(recipe))


def _changed(before: Plan, after: Plan) -> set[str]:
    stages = stages_of(before)
    assert stages == stages_of(after)
    source = SourceState.of(before.source)
    old, new = fingerprints(before, stages, source), fingerprints(after, stages, source)
    return {name for name in old if old[name] != new[name]}


@pytest.mark.parametrize(
    ("parts", "redone"),
    [
        ({}, set()),
        ({"source": {"identity": "another"}}, _ALL),
        ({"text": {"calibration_sha256": "another"}}, _ALL),
        ({"text": {"heldout_chunks_per_file": 3}}, _ALL),
        ({"threads": 2}, _ALL),
        ({"compress": {"method": "reap", "experts": 8}}, _FROM_COMPRESS | _VALIDATIONS),
        ({"recover": {"rungs": [_RUNG]}}, _FROM_COMPRESS - {"compress"} | _VALIDATIONS),
        ({"recover": {"seed": 5}}, _FROM_COMPRESS - {"compress"} | _VALIDATIONS),
        ({"gguf": "Q8_0"}, {"gguf"} | _VALIDATIONS),
        ({"onnx": "Q4_0"}, {"onnx"} | _VALIDATIONS),
        # genai_config.json names the context
        ({"budget": {"context": 256}}, {"onnx", "teacher_gguf"} | _VALIDATIONS),
        ({"budget": {"kv_type": "q8_0"}}, {"onnx", "teacher_gguf"} | _VALIDATIONS),
    ],
)
def test_a_changed_choice_redoes_exactly_what_depends_on_it(
    plan: Plan, parts: dict[str, Any], redone: set[str]
) -> None:
    assert _changed(plan, _edited(plan, **parts)) == redone


def test_what_does_not_determine_outputs_redoes_nothing(plan: Plan) -> None:
    elsewhere = replace(plan, out=Path("elsewhere"), command="another", memory_bytes=1, require={"kld": 0.5})
    assert _changed(plan, elsewhere) == set()


def test_a_touched_checkpoint_redoes_everything(plan: Plan) -> None:
    stages, before = stages_of(plan), SourceState.of(plan.source)
    weights = plan.source / "model.safetensors"
    modified = weights.stat().st_mtime_ns
    os.utime(weights, ns=(modified + 1, modified + 1))
    touched = SourceState.of(plan.source)
    os.utime(weights, ns=(modified, modified))
    old, new = fingerprints(plan, stages, before), fingerprints(plan, stages, touched)
    assert {name for name in old if old[name] != new[name]} == _ALL
    assert fingerprints(plan, stages, SourceState.of(plan.source)) == old


def test_a_raised_version_redoes_the_stage_and_what_follows(plan: Plan) -> None:
    stages, source = stages_of(plan), SourceState.of(plan.source)
    before = fingerprints(plan, stages, source)
    raised = [replace(stage, version=stage.version + 1) if stage.name == "onnx" else stage for stage in stages]
    after = fingerprints(plan, raised, source)
    assert {name for name in before if before[name] != after[name]} == {"onnx"} | _VALIDATIONS


def test_files_of_the_kernels_codes_need_no_sensitivities(plan: Plan) -> None:
    kernels = {"mix": "Q4_0", "quantizer": "kernel"}
    assert {stage.name for stage in stages_of(_edited(plan, gguf=kernels, onnx=kernels))} == _ALL - {"sensitivity"}


def test_a_search_begins_with_what_all_budgets_share(plan: Plan) -> None:
    assert [stage.name for stage in search_stages(plan)] == ["calibrate", "sensitivity", "search"]
    smaller = _edited(plan, budget={"bytes": 80_000_000})
    source, stages = SourceState.of(plan.source), search_stages(plan)
    before, after = fingerprints(plan, stages, source), fingerprints(smaller, stages, source)
    assert {name for name in before if before[name] != after[name]} == {"search"}


def test_every_part_of_a_recipe_matters_to_a_stage(plan: Plan) -> None:
    """``save_student`` only adds a stage. What calibration keeps for later ones is a property of the plan."""
    parts = {choice for stage in stages_of(plan) for choice in stage.choices}
    of_plan = {"keeps_layer_inputs", "keeps_targets", "selection_blocks"}
    assert parts == (set(Recipe.model_fields) - {"version", "save_student"}) | of_plan


def test_only_what_the_recipe_wants_is_planned(plan: Plan) -> None:
    assert {stage.name for stage in stages_of(plan)} == _ALL
    without = {"onnx", "validate_onnx", "teacher_onnx", "student"}
    assert {stage.name for stage in stages_of(_edited(plan, onnx=None, save_student=False))} == _ALL - without
    without = {"gguf", "validate_gguf", "teacher_gguf"}
    assert {stage.name for stage in stages_of(_edited(plan, gguf=None))} == _ALL - without
    no_floor = replace(plan, teacher_floors={})
    assert {stage.name for stage in stages_of(no_floor)} == _ALL - {"teacher_gguf", "teacher_onnx"}


def test_a_plan_survives_its_file(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert set(plan.teacher_floors) == {"gguf", "onnx"}
    replace(plan, heldout=None).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").heldout is None
    assert isinstance(plan.recipe.compress.experts, int)
    assert plan.student_spec == plan.teacher_spec.with_experts(plan.recipe.compress.experts)


@pytest.fixture
def work(plan: Plan, tmp_path: Path) -> WorkDirectory:
    work = WorkDirectory(tmp_path / "work")
    work.folder.mkdir()
    plan.save(work.plan_path)
    return work


def _some(plan: Plan, *names: str) -> Sequence[Stage]:
    return [stage for stage in stages_of(plan) if stage.name in names]


def _lines(said: list[str]) -> RunProgress:
    return RunProgress(PlainLines(said.append))


def test_finished_stages_are_not_redone_and_outdated_ones_are(plan: Plan, work: WorkDirectory) -> None:
    """schedule and recover of a plan that teaches nothing need nothing but the plan."""
    said: list[str] = []
    stages = _some(plan, "schedule", "recover")
    first = run_stages(plan, work, stages, _lines(said))
    assert json.loads((work.stage("recover") / "recovery.json").read_text()) == []
    assert first["schedule"].peak_rss_bytes > 10_000_000
    assert [line for line in said if line.endswith("done already")] == []

    said.clear()
    assert run_stages(plan, work, stages, _lines(said)) == first
    assert said == [f"[{n}/2] {stage.what}: done already" for n, stage in enumerate(stages, 1)]

    said.clear()
    raised = [stages[0], replace(stages[1], version=stages[1].version + 1)]
    again = run_stages(plan, work, raised, _lines(said))
    assert again["schedule"] == first["schedule"]
    assert again["recover"].fingerprint != first["recover"].fingerprint
    assert said[:2] == [f"[1/2] {stages[0].what}: done already", f"[2/2] {stages[1].what}"]


def _done(plan: Plan, work: WorkDirectory, stages: Sequence[Stage]) -> None:
    """Leaves every stage finished, with a file of each kind."""
    expected = fingerprints(plan, stages, SourceState.of(plan.source))
    for stage in stages:
        partial = work.begin(stage.name, expected[stage.name])
        for file in filter(lambda file: file.name, stage.writes):
            path = file.within(partial, name="toy", artifact="gguf", layer=0, number=0, rate=0.1)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        work.finish(stage.name, StageRecord(expected[stage.name], 1.0, 0))


def test_what_no_stage_to_come_reads_goes_and_nothing_is_redone(plan: Plan, work: WorkDirectory) -> None:
    stages = stages_of(plan)
    _done(plan, work, stages)
    run_stages(plan, work, stages, RunProgress(show_nothing))
    assert LAYER_INPUTS.within(work.stage("calibrate")).exists(), "nobody said that it may go"
    run_stages(plan, work, stages, RunProgress(show_nothing), kept=["calibrate"])
    assert LAYER_INPUTS.within(work.stage("calibrate")).exists()
    assert not work.paths("validate_written", ROUTER_INPUTS)
    run_stages(plan, work, stages, RunProgress(show_nothing), kept=())
    left = {
        (stage.name, file) for stage in stages for file in stage.writes if file.name and work.paths(stage.name, file)
    }
    assert left <= OF_THE_REPORT, "the report needs the others"
    assert {("calibrate", ROUTING), ("gguf", GGUF_FILE), ("onnx", ONNX_FOLDER)} <= left
    assert unfinished(plan, work, stages) == []


def test_a_stage_whose_files_are_gone_runs_again_for_one_that_needs_them(plan: Plan, work: WorkDirectory) -> None:
    stages = stages_of(plan)
    _done(plan, work, stages)
    run_stages(plan, work, stages, RunProgress(show_nothing), kept=())
    (work.stage("validate_gguf") / "stage.json").unlink()
    assert unfinished(plan, work, stages) == ["calibrate", "validate_written", "validate_gguf"]
    (work.stage("student") / "stage.json").unlink()
    again = ["calibrate", "compress", "recover", "student", "validate_written", "validate_gguf"]
    assert sorted(unfinished(plan, work, stages)) == sorted(again)


_FEEDBACK, _KERNEL = {"quantizer": "feedback"}, {"quantizer": "kernel"}


@pytest.mark.parametrize(
    ("parts", "taker"),
    [
        ({"gguf": _FEEDBACK, "onnx": _FEEDBACK}, "onnx"),
        ({"gguf": _FEEDBACK, "onnx": _KERNEL}, "gguf"),
        ({"gguf": _FEEDBACK, "onnx": _FEEDBACK, "compress": {"method": "reap", "experts": 8}}, None),
    ],
)
def test_the_last_writer_gets_the_layer_inputs_and_goes_on_with_them(
    plan: Plan, work: WorkDirectory, monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any], taker: str | None
) -> None:
    plan = replace(_edited(plan, **parts), search=None)
    stages, seen = stages_of(plan), {}

    def run(work: WorkDirectory, name: str, *_: Any, **__: Any) -> Outcome:
        seen[name] = LAYER_INPUTS.within(work.partial(name)).exists()
        if name == "onnx":
            raise _Interrupted
        return Outcome(peak_rss_bytes=1)

    _done(plan, work, stages)
    for writer in ("gguf", "onnx"):
        (work.stage(writer) / "stage.json").unlink()
    monkeypatch.setattr(running, "run_in_process", run)
    with pytest.raises(_Interrupted):
        run_stages(plan, work, stages, RunProgress(show_nothing), kept=())
    assert seen == {writer: writer == taker for writer in ("gguf", "onnx")}
    assert not LAYER_INPUTS.within(work.stage("calibrate")).exists()
    assert unfinished(plan, work, stages) == ["onnx"], "it can make the inputs itself"
    with pytest.raises(_Interrupted):
        run_stages(plan, work, stages, RunProgress(show_nothing), kept=())
    assert seen["onnx"] == (taker == "onnx")


def _calibration_of_another_text(plan: Plan) -> Plan:
    return _edited(plan, text={"calibration_sha256": "0" * 64})


def _another_model(plan: Plan) -> Plan:
    return _edited(plan, source={"identity": "0" * 64})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_calibration_of_another_text, "calibration has changed since this run was planned"),
        (_another_model, "1-layers has changed since this run was planned"),
    ],
)
def test_a_stage_that_fails_says_why_and_leaves_nothing_finished(
    plan: Plan, work: WorkDirectory, change: Callable[[Plan], Plan], said: str
) -> None:
    changed = change(plan)
    changed.save(work.plan_path)
    with pytest.raises(StageError, match=said) as failed:
        run_stages(changed, work, _some(plan, "calibrate"), RunProgress(show_nothing))
    assert failed.value.exit_code == 2
    assert work.record("calibrate") is None
    assert not work.stage("calibrate").exists()


@pytest.mark.usefixtures("torch_left_as_it_was")
def test_a_stage_that_opens_what_it_does_not_declare_fails(plan: Plan, work: WorkDirectory) -> None:
    lost = replace(COMPRESS, reads=frozenset())
    with pytest.raises(UndeclaredFileError, match=r"blocks\.safetensors of stage calibrate is not declared"):
        run_stage(lost, plan, work)


class _Interrupted(Exception):
    pass


def _interrupt(event: Event) -> None:
    raise _Interrupted


def test_an_edited_recipe_file_is_not_mistaken_for_the_one_that_was_begun(
    plan: Plan, small_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(plan.recipe.model_dump()))  # JSON is YAML
    job = _job(plan.source, small_texts, recipe=recipe, out=tmp_path / "out")
    for _ in range(2):  # the same recipe goes on with the same plan
        with pytest.raises(_Interrupted):
            run_job(job, "moe-export", _interrupt)
    recipe.write_text(json.dumps(_edited(plan, gguf="Q8_0").recipe.model_dump()))
    with pytest.raises(InputError, match=r"belongs to another run \(its recipe differ\)"):
        run_job(job, "moe-export", _interrupt)
