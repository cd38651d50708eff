"""Compares the estimated needs of a run with sums that are made in another way."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from compressors.model.errors import InputError
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from exporter.estimating.disk import disk_by_stage, disk_lines, disk_lines_of_all
from exporter.estimating.estimate import Speeds, describe_time, seconds_by_stage
from exporter.estimating.machine import measure_speeds
from exporter.estimating.needs import memory_lines
from exporter.planning.job import Flags, Job
from exporter.planning.plan import Plan, Search
from exporter.planning.plan_making import make_plan
from exporter.planning.preflight import refuse_to_cut_onnx, refuse_too_little_disk, refuse_too_little_memory
from exporter.planning.recipe import FileChoice, Recipe
from exporter.progress.views import PlainLines
from exporter.run import run_job
from exporter.searching.structures import structures_for
from tests.altered import altered

_START = 4
_ROUTER = {"scope": "router", "blocks": 40, "blocks_per_step": 8, "learning_rate": 0.001}
_FAST = Speeds(read_bytes=1e15, multiply_adds=1e6, reference_multiply_adds=1e6, quantized_values=1e15)
_PLENTY = 10**15


@pytest.fixture(scope="module")
def job(toy_model: Path, small_texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The toy's job: 12 of 32 experts, routers taught, both artifacts in Q4_0, and the student's checkpoint."""
    calibration, text = small_texts
    out = tmp_path_factory.mktemp("estimate") / "out"
    return Flags(
        model=str(toy_model),
        budget="3MB",
        budget_kind="file",
        quant="Q4_0",
        calibration=calibration,
        text=text,
        threads=1,
        context=512,
        save_student=True,
        floors=True,
        out=out,
    ).job()


@pytest.fixture(scope="module")
def plan(job: Job) -> Plan:
    """The plan with 40, 4, and 3 blocks of each of two held-out files. Both written files hold the same numbers."""
    plan = make_plan(job, "moe-export")
    text = {"calibration_blocks": 40, "selection_blocks": 4, "heldout_chunks_per_file": 3}
    gguf = {"tensors": {"token_embd.weight": "Q8_0"}, "quantizer": "kernel"}
    return _edited(plan, text=text, recover={"rungs": [_ROUTER]}, gguf=gguf, onnx={"quantizer": "kernel"})


def _edited(plan: Plan, **parts: Mapping[str, Any]) -> Plan:
    recipe = plan.recipe.model_dump()
    for name, part in parts.items():
        recipe[name] |= part
    return replace(plan, recipe=Recipe.model_validate(recipe))


def _choosing_codes(plan: Plan) -> Plan:
    return _edited(plan, gguf={"quantizer": "feedback"}, onnx={"quantizer": "feedback"})


def _with_types(plan: Plan, gguf: str, onnx: str) -> Plan:
    files = {"gguf": FileChoice(mix=gguf), "onnx": FileChoice(mix=onnx)}
    return replace(plan, recipe=plan.recipe.model_copy(update=files))


def _matrix_values(plan: Plan, n_experts_per_token: int) -> int:
    """Weights that one token uses: all but norms, with its share of the experts. The embedding is the head."""
    headers = Checkpoint(plan.source).headers
    sizes = {name: prod(header.shape) for name, header in headers.items() if len(header.shape) == 2}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    others = sum(size for name, size in sizes.items() if ".experts." not in name)
    assert plan.teacher_spec.tied_embeddings
    return others + experts * n_experts_per_token // plan.teacher_spec.n_experts


def test_seconds_are_tokens_times_weights_where_reading_costs_nothing(plan: Plan) -> None:
    seconds = seconds_by_stage(plan, _FAST, _PLENTY)
    per_block = 512 * _matrix_values(plan, plan.teacher_spec.top_k) / 1e6
    assert seconds["calibrate"] - _START == pytest.approx((40 + 4 + 6) * per_block, rel=0.001)
    # the student lacks router rows of 20 experts in 2 layers
    per_block -= 512 * 2 * 20 * plan.teacher_spec.hidden_size / 1e6
    assert seconds["validate_torch"] - _START == pytest.approx(6 * per_block, rel=0.001)
    assert seconds["validate_gguf"] - _START == pytest.approx((6 + 1) * per_block, rel=0.001)
    assert seconds["schedule"] - _START == pytest.approx(3 * 8 * per_block, rel=0.001)
    # both files hold the same numbers
    assert seconds["validate_written"] == seconds["validate_torch"]
    different = _with_types(plan, "Q8_0", "Q4_0")
    twice = seconds_by_stage(different, _FAST, _PLENTY)["validate_written"]
    assert twice - _START == pytest.approx(2 * (seconds["validate_torch"] - _START))
    assert set(seconds) == {
        *("calibrate", "compress", "schedule", "recover", "gguf", "onnx", "student"),
        *("teacher_texts", "validate_torch", "validate_written", "validate_gguf", "validate_onnx"),
        *("teacher_gguf", "teacher_onnx"),
    }


def test_a_part_of_the_original_is_run_by_torch_too(plan: Plan) -> None:
    """Six chunks through both layers in the runtime alone, or through one in the runtime and in torch."""
    seconds = seconds_by_stage(plan, _FAST, _PLENTY)
    whole = 512 * _matrix_values(plan, plan.teacher_spec.top_k) / 1e6
    assert seconds["teacher_gguf"] - _START == pytest.approx(6 * whole, rel=0.001)
    one_layer = replace(plan.teacher_floors["onnx"], n_layers=1)
    cut = seconds_by_stage(replace(plan, teacher_floors={"onnx": one_layer}), _FAST, _PLENTY)
    assert "teacher_gguf" not in cut
    head = 512 * plan.teacher_spec.vocab_size * plan.teacher_spec.hidden_size / 1e6
    assert cut["teacher_onnx"] - _START == pytest.approx(2 * 6 * (head + (whole - head) / 2), rel=0.001)


def test_methods_that_look_at_text_take_a_pass_or_two(plan: Plan) -> None:
    """A sample of 32 of the 40 blocks runs through the teacher, then all through the student whose experts changed."""
    assert seconds_by_stage(plan, _FAST, _PLENTY)["compress"] == _START, "REAP reads the sums of calibration"
    per_block = 512 * _matrix_values(plan, plan.teacher_spec.top_k) / 1e6
    student_block = per_block - 512 * 2 * 20 * plan.teacher_spec.hidden_size / 1e6
    for method, sequential, passes in (
        ("removal-error", False, 32 * per_block),
        ("reap", True, 40 * per_block),
        ("hc-smoe", False, 32 * per_block + 40 * student_block),
        ("ream", True, 40 * per_block + 40 * student_block),
    ):
        edited = _edited(plan, compress={"method": method, "sequential": sequential})
        seconds = seconds_by_stage(edited, _FAST, _PLENTY)["compress"] - _START
        assert seconds == pytest.approx(passes, rel=0.001), method
    experts = 2 * 12 * 3 * 128 * 256 * 2
    changing = disk_by_stage(_edited(plan, compress={"method": "m-smoe"}))
    with_experts = {stage for stage, lines in changing.items() if lines.get("changed experts") == experts}
    until_torch = {*("compress", "schedule", "recover", "gguf", "onnx", "student", "teacher_texts", "validate_torch")}
    assert with_experts == until_torch, "the files have their own"
    assert not any("changed experts" in lines for lines in disk_by_stage(plan).values())


def test_what_is_reported_is_computed_in_float32(plan: Plan) -> None:
    """Four times as slow as the arithmetic of calibration, on a processor with matrix units."""
    usual = seconds_by_stage(plan, _FAST, _PLENTY)
    slow_reference = seconds_by_stage(plan, replace(_FAST, reference_multiply_adds=1e6 / 4), _PLENTY)
    assert slow_reference["schedule"] == usual["schedule"]
    for stage in ("validate_torch", "validate_gguf"):
        assert slow_reference[stage] - _START == pytest.approx(4 * (usual[stage] - _START))
    calibrate = usual["calibrate"] - _START
    assert slow_reference["calibrate"] - _START == pytest.approx(calibrate * (40 + 4 * (4 + 6)) / (40 + 4 + 6))


def test_recovery_takes_its_steps_or_its_time_limit(plan: Plan) -> None:
    step = seconds_by_stage(plan, _FAST, _PLENTY)["schedule"] - _START
    judging = 2 * 4 / 8 * step / 3
    for limit, steps in ((10**9, 5 * step), (7, 7)):
        seconds = seconds_by_stage(replace(plan, recover_seconds=limit), _FAST, _PLENTY)
        assert seconds["recover"] - _START == pytest.approx(steps + judging)
    recipe = replace(plan, recover_seconds=0)
    assert seconds_by_stage(recipe, _FAST, _PLENTY)["schedule"] == _START, "a recipe's steps are not timed"
    two = _edited(plan, recover={"rungs": [_ROUTER, _ROUTER | {"scope": "experts", "blocks": 24}]})
    seconds = seconds_by_stage(replace(two, recover_seconds=10**9), _FAST, _PLENTY)
    assert seconds["schedule"] - _START == pytest.approx(step * (3 + 4) / 3), "experts have gradients of their own"
    assert seconds["recover"] - _START == pytest.approx(step * (5 + 3 * 4 / 3) + judging * 3 / 2)
    after = _edited(plan, recover={"after_quantizing": _ROUTER | {"blocks": 80}})
    seconds = seconds_by_stage(replace(after, recover_seconds=10**9), _FAST, _PLENTY)
    assert seconds["retune"] - _START == pytest.approx(step * 10 + judging)
    assert seconds["recover"] - _START == pytest.approx(step * 5 + judging)
    different = seconds_by_stage(replace(_with_types(after, "Q8_0", "Q4_0"), recover_seconds=10**9), _FAST, _PLENTY)
    assert different["retune"] - _START == pytest.approx(2 * (step * 10 + judging)), "each file is taught by itself"
    seconds = seconds_by_stage(replace(after, recover_seconds=3), _FAST, _PLENTY)
    assert seconds["retune"] - _START == pytest.approx(2 + judging), "time is shared out by what there is to do"
    none = _edited(plan, recover={"rungs": []})
    assert not {"schedule", "recover", "retune"} & set(seconds_by_stage(none, _FAST, _PLENTY))


def test_a_checkpoint_larger_than_the_free_memory_is_read_in_every_pass(plan: Plan) -> None:
    slow_disk = Speeds(read_bytes=1e6, multiply_adds=1e15, reference_multiply_adds=1e15, quantized_values=1e15)
    checkpoint = Checkpoint(plan.source)
    once = checkpoint.n_bytes / 1e6
    fits = seconds_by_stage(plan, slow_disk, checkpoint.n_bytes + 1)
    assert fits["calibrate"] - _START == pytest.approx(once, rel=0.001)
    assert fits["validate_torch"] == pytest.approx(_START, abs=0.01)
    does_not = seconds_by_stage(plan, slow_disk, checkpoint.n_bytes)
    student = plan.student_spec.parameters * 2 / 1e6
    assert does_not["validate_torch"] - _START == pytest.approx(student)
    assert does_not["recover"] - _START == pytest.approx((5 * 3 + 2) * student)
    assert does_not["gguf"] - _START == pytest.approx(student + plan.predictions["gguf"].file / 1e6)
    choosing = seconds_by_stage(_choosing_codes(plan), slow_disk, checkpoint.n_bytes)
    assert choosing["gguf"] - does_not["gguf"] == pytest.approx(student), "it runs first"


def test_quantizing_counts_for_types_that_are_quantized(plan: Plan) -> None:
    slow = Speeds(read_bytes=1e15, multiply_adds=1e15, reference_multiply_adds=1e15, quantized_values=1e6)
    quantizing = plan.student_spec.parameters / 1e6
    seconds = seconds_by_stage(_choosing_codes(plan), slow, _PLENTY)
    assert seconds["gguf"] - _START == seconds["onnx"] - _START == pytest.approx(3 * quantizing, rel=0.001)
    seconds = seconds_by_stage(plan, slow, _PLENTY)
    assert seconds["gguf"] - _START == seconds["onnx"] - _START == pytest.approx(quantizing)
    assert seconds["student"] == pytest.approx(_START, abs=0.01)


def test_a_student_that_differs_runs_before_its_codes_are_chosen(plan: Plan) -> None:
    """40 blocks through 12 of 32 experts; nothing where the kernels choose, or where the original itself is written."""
    per_block = 512 * _matrix_values(plan, plan.teacher_spec.top_k) / 1e6
    student_block = per_block - 512 * 2 * 20 * plan.teacher_spec.hidden_size / 1e6
    fed_back = _choosing_codes(plan)
    seconds = seconds_by_stage(fed_back, _FAST, _PLENTY)
    assert seconds["gguf"] - _START == seconds["onnx"] - _START == pytest.approx(40 * student_block, rel=0.001)
    original = _edited(fed_back, recover={"rungs": []}, compress={"method": "none", "experts": 32})
    assert seconds_by_stage(original, _FAST, _PLENTY)["gguf"] == pytest.approx(_START, abs=0.01)
    assert seconds_by_stage(plan, _FAST, _PLENTY)["gguf"] == pytest.approx(_START, abs=0.01), "the kernels choose"


def test_a_search_reads_the_model_and_measures_files_as_long_as_it_may(plan: Plan) -> None:
    """Five files of each artifact, written with chosen codes and judged on the selection split."""
    searched = replace(_with_types(plan, "Q8_0", "Q4_0"), search=Search("auto", None, "moe", "auto", "quality", 10**9))
    spec, n_selection = plan.teacher_spec, plan.recipe.text.selection_blocks
    judging = n_selection * 512 * _matrix_values(plan, spec.top_k) / 1e6
    reading = spec.parameters * 2 / _FAST.read_bytes
    seconds = seconds_by_stage(searched, _FAST, _PLENTY)
    assert seconds["search"] - _START == pytest.approx(reading + 2 * 5 * judging, rel=0.01)
    watched = 4 * 8 * 512 * _matrix_values(plan, spec.top_k) / 1e6
    assert seconds["sensitivity"] - _START == pytest.approx(watched, rel=0.001)
    limited = replace(searched, search=replace(searched.search, plan_seconds=1))
    assert seconds_by_stage(limited, _FAST, _PLENTY)["search"] - _START == pytest.approx(reading + 1, rel=0.01)
    assert "search" not in seconds_by_stage(plan, _FAST, _PLENTY)


def test_the_time_is_told_in_parts() -> None:
    seconds = {"calibrate": 1500.0, "recover": 1800.0, "schedule": 60.0, "gguf": 300.0, "onnx": 240.0}
    assert describe_time(seconds | {"validate_torch": 1200.0, "validate_gguf": 600.0}) == (
        "about 1 h 35 min (calibration 25 min, recovery 31 min, writing 9 min, validation 30 min)"
    )
    assert describe_time({"onnx": 30.0}) == "about 30 s (writing 30 s)"


def test_the_machine_is_measured(plan: Plan) -> None:
    speeds = measure_speeds(plan)
    for speed in vars(speeds).values():
        assert 1e5 < speed < 1e14
    assert measure_speeds(_with_types(plan, "BF16", "F32")).quantized_values == float("inf")


def test_every_file_of_a_run_has_a_line(plan: Plan) -> None:
    spec, by_stage = plan.teacher_spec, disk_by_stage(plan)
    of_all = 512 * spec.hidden_size
    calibrate = by_stage["calibrate"]
    assert plan.recipe.arithmetic == "float32"
    late = calibrate["predictions"] + calibrate["training targets"]  # written when the snapshot is gone
    assert calibrate["hidden states"] + late == 2 * (40 + 4 + 6) * of_all * 4, "those in use, and a snapshot"
    assert calibrate["training targets"] == 40 * 512 * 64 * 8
    assert calibrate["token blocks"] == (40 + 4 + 6) * 512 * 8
    assert "layer inputs" not in calibrate, "the kernels choose the codes"
    # 255 of 512 positions are scored, by the teacher, and by torch with the files' numbers, which are the same
    assert calibrate["predictions"] == (4 + 6) * 255 * spec.hidden_size * 4
    assert by_stage["validate_written"]["predictions"] == 2 * 6 * 255 * spec.hidden_size * 4, "nothing is trained now"
    # the GGUF's are recorded for the ONNX file to be compared with
    recorded = "log-probabilities in 16 bits"
    assert by_stage["validate_onnx"][recorded] == 6 * 255 * (2 * spec.vocab_size + 8)
    assert not any(recorded in lines for lines in disk_by_stage(_with_types(plan, "Q8_0", "Q4_0")).values())
    for name, floor in plan.teacher_floors.items():
        lines = by_stage[f"teacher_{name}"]
        assert lines["the original, unquantized, while it is measured"] == floor.file_bytes
    files = {"gguf files": plan.predictions["gguf"].file, "onnx files": plan.predictions["onnx"].file}
    assert by_stage["validate_onnx"].items() >= files.items()
    assert {"statistics", "routing"} <= set(by_stage["onnx"]) and "student checkpoint" in by_stage["student"]
    assert disk_lines(plan) == max(by_stage.values(), key=lambda lines: sum(lines.values()))
    assert disk_lines(plan, ["schedule"]) == by_stage["schedule"]


def test_layer_inputs_lie_there_while_codes_are_chosen(plan: Plan) -> None:
    """Two layers and the head: the original's until the last file uses them up, or the student's beside its file."""
    of_all = 512 * plan.teacher_spec.hidden_size
    inputs, states = 3 * 40 * of_all * 2, 40 * of_all * 4
    whole = {"compress": {"experts": 32, "method": "none"}, "recover": {"rungs": []}}
    by_stage = disk_by_stage(_choosing_codes(_edited(plan, **whole)))
    until = {stage for stage, lines in by_stage.items() if lines.get("layer inputs") == inputs}
    assert until == {"calibrate", "sensitivity", "compress", "schedule", "recover", "gguf"}
    assert inputs // 3 <= by_stage["onnx"]["layer inputs"] < inputs
    assert "layer inputs" not in by_stage["student"]
    by_stage = disk_by_stage(_edited(plan, gguf={"quantizer": "feedback"}))
    until = {stage for stage, lines in by_stage.items() if "layer inputs" in lines}
    assert until == {"calibrate"}, "the pruned student's layers have others"
    of_the_student = "layer inputs of the student, while codes are chosen"
    assert {stage for stage, lines in by_stage.items() if of_the_student in lines} == {"gguf"}
    at_once = by_stage["gguf"][of_the_student] + plan.predictions["gguf"].file
    assert at_once == inputs + states, "the file is smaller, and begun when the states are gone"


def test_a_search_needs_one_structure_and_one_layer_of_a_file_at_a_time(plan: Plan) -> None:
    kernels = {"gguf": {"quantizer": "kernel"}, "onnx": {"quantizer": "kernel"}}
    searched = replace(_edited(plan, **kernels), search=Search("slim", None, "moe", "none", "quality", 1))
    spec, lines = plan.teacher_spec, disk_by_stage(searched)["search"]
    tried, of_all = "a smaller structure that the search tries", 512 * spec.hidden_size
    measured = lines["a layer of a file that the search measures"]
    assert 0 < measured <= max(entry.file for entry in plan.predictions.values())
    n_kept = spec.expert_width // 2  # of each neuron that stays a number, and a factor of each of those that went
    structure = 2 * 32 * n_kept * (4 + 4 * n_kept)
    summed = 2 * 40 * of_all * 4 - measured  # the states behind its statistics, before a file is there
    assert structure + summed < lines[tried] < structure + summed + lines["statistics"]
    states = 40 * of_all * 4  # what enters one layer, while its codes are chosen
    with_codes = disk_by_stage(_choosing_codes(searched))["search"][tried]
    assert with_codes - lines[tried] == max(0, states - max(0, summed))
    pruned = replace(searched, search=Search("reap", None, "moe", "none", "quality", 1))
    watched = 4 * 8 * (2 + 2) * of_all - measured  # every layer's input, for sensitivities
    assert disk_by_stage(pruned)["search"][tried] == max(0, watched), "no expert changes"


def test_a_search_for_gguf_alone_leaves_out_structures_that_only_onnx_holds(plan: Plan) -> None:
    search = Search("auto", None, "moe", "auto", "quality", 1)
    assert any(choice.apart for choice in structures_for(search, plan.teacher_spec)), "experts on shared bases"
    predictions = {"gguf": plan.predictions["gguf"]}
    recipe = plan.recipe.model_copy(update={"onnx": None})
    alone = replace(plan, recipe=recipe, predictions=predictions, search=search)
    assert disk_by_stage(alone)["search"]["a smaller structure that the search tries"] > 0


def test_training_needs_its_snapshots_and_what_it_taught(plan: Plan) -> None:
    spec, by_stage = plan.student_spec, disk_by_stage(plan)
    routers, inputs = 2 * 12 * spec.hidden_size * 4, 3 * 8 * 512 * spec.hidden_size * 4
    assert by_stage["schedule"]["training"] == inputs
    assert by_stage["recover"]["training"] == inputs + 2 * 3 * routers, "with both moments"
    assert by_stage["gguf"]["what recovery taught"] == routers
    experts = 2 * 12 * 3 * spec.hidden_size * spec.expert_width
    taught = disk_by_stage(_edited(plan, recover={"rungs": [_ROUTER | {"scope": "experts"}]}))
    assert taught["recover"]["training"] == inputs + 2 * 3 * (routers + experts * 4)
    assert taught["gguf"]["what recovery taught"] == routers + experts * 2
    for n_steps, n_snapshots in ((1, 0), (2, 1), (3, 2)):  # none is of the last step
        short = disk_by_stage(_edited(plan, recover={"rungs": [_ROUTER | {"blocks": 8 * n_steps}]}))
        assert short["recover"]["training"] == inputs + n_snapshots * 3 * routers
    none = disk_by_stage(_edited(plan, recover={"rungs": []}))
    assert not any({"training", "what recovery taught", "training targets"} & set(lines) for lines in none.values())


def test_memory_does_not_grow_with_depth_and_fits_the_promises(plan: Plan) -> None:
    olmoe = altered(
        plan.teacher_spec, n_layers=16, hidden_size=2048, n_heads=16, n_kv_heads=16, head_dim=128, n_experts=64,
        top_k=8, expert_width=1024, vocab_size=50304,
    )  # fmt: skip
    qwen = altered(olmoe, n_layers=48, n_heads=32, n_kv_heads=4, n_experts=128, expert_width=768, vocab_size=151936)
    lines = memory_lines(olmoe, olmoe, 2)
    assert lines["two decoder layers"] == pytest.approx(2 * 2 * (64 * 3 * 2048 * 1024 + 4 * 2048**2), rel=0.001)
    assert sum(lines.values()) < 3.5e9
    assert sum(memory_lines(qwen, qwen, 2).values()) < 5e9
    assert memory_lines(altered(qwen, n_layers=6), qwen, 2) == memory_lines(qwen, qwen, 2)
    few_wide = altered(olmoe, hidden_size=4096, n_experts=2, top_k=1, expert_width=14336)
    widest = memory_lines(few_wide, few_wide, 2)["what enters an expert, while its codes are chosen"]
    assert 8 * 4 * 14336**2 < widest + 2 * 2 * few_wide.layers[0].parameters + 0.6e9 < 12 * 4 * 14336**2
    wide = replace(plan.teacher_spec, vocab_size=1_000_000)
    both_heads = memory_lines(wide, wide, 2)["the head of the student and of the original"]
    assert both_heads == (4 + 2) * 1_000_000 * wide.hidden_size, "one of them in float32"


def test_too_little_memory_is_refused_with_figures() -> None:
    lines = {"two decoder layers": 2_000_000_000, "the process itself": 1_000_000_000}
    refuse_too_little_memory(lines, 3_000_000_000, 3_000_000_000)
    with pytest.raises(
        InputError, match=r"^2\.9 GB .* of memory are free, less than the 3\.0 GB .* \(two decoder layers"
    ):
        refuse_too_little_memory(lines, 9_000_000_000, 2_900_000_000)
    with pytest.raises(InputError, match=r"^--memory: 2\.9 GB .* is below the 3\.0 GB .* 8\.0 GB .* are free: give"):
        refuse_too_little_memory(lines, 2_900_000_000, 8_000_000_000)


def test_too_little_disk_is_refused_with_figures(plan: Plan, tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    refuse_too_little_disk([plan], work, plan.out)
    predictions = plan.predictions | {"gguf": replace(plan.predictions["gguf"], file=10**18)}
    large = replace(plan, predictions=predictions)
    with pytest.raises(InputError) as refused:
        refuse_too_little_disk([large], work, large.out)
    assert re.match(
        rf"{tmp_path} has .* free, and the run puts up to 1000000\.\d TB \(.*\) there "
        r"\(.*gguf files .*, onnx files .*\); free space, choose another --work-dir and --out, or use --force",
        str(refused.value),
    )


def test_several_budgets_share_what_is_made_once(plan: Plan) -> None:
    plan = _choosing_codes(plan)
    plan = replace(plan, teacher_floors={})
    last = disk_by_stage(plan)["validate_onnx"]
    two = disk_lines_of_all([plan, plan])
    assert two["layer inputs"] == disk_by_stage(plan)["calibrate"]["layer inputs"], "they stay for the second"
    assert two["token blocks"] == last["token blocks"]
    for what in ("gguf files", "onnx files"):
        assert two[what] == 2 * last[what], what
    assert two["student checkpoint"] == last["student checkpoint"], "the second's comes after the fullest stage"
    assert disk_lines_of_all([plan]) == disk_lines(plan)


def test_what_an_unfinished_run_has_written_is_not_needed_again(plan: Plan, tmp_path: Path) -> None:
    gguf = replace(plan.predictions["gguf"], file=shutil.disk_usage(tmp_path).free)
    large = replace(plan, predictions=plan.predictions | {"gguf": gguf})
    work = tmp_path / "out.work"
    with pytest.raises(InputError):
        refuse_too_little_disk([large], work, large.out)
    work.mkdir()
    with (work / "sparse").open("wb") as file:
        file.truncate(sum(disk_lines(large).values()))
    refuse_too_little_disk([large], work, large.out)


def test_an_onnx_file_s_data_are_not_cut(plan: Plan) -> None:
    n_bytes = plan.predictions["onnx"].file
    refuse_to_cut_onnx(replace(plan, shard_bytes=n_bytes))
    refuse_to_cut_onnx(replace(plan, shard_bytes=1, recipe=plan.recipe.model_copy(update={"onnx": None})))
    with pytest.raises(InputError, match=r"--shard-size: an ONNX file's data are not cut.*--formats gguf"):
        refuse_to_cut_onnx(replace(plan, shard_bytes=n_bytes - 1))


class _Begun(Exception):
    pass


def test_force_overrides_the_refusals_and_the_needs_are_announced(job: Job) -> None:
    too_little = replace(job, memory_bytes=1_000_000)
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        if line.startswith("["):
            raise _Begun

    view = PlainLines(hear)
    with pytest.raises(InputError, match="--memory"):
        run_job(too_little, "moe-export", view)
    assert said == []
    assert not job.work_dir.exists()
    with pytest.raises(_Begun):
        run_job(replace(too_little, force=True), "moe-export", view)
    memory, disk, time = said[:3]
    assert re.fullmatch(r"memory: at least .*; this run takes up to 1\.0 MB .*\(--memory\), .* are free", memory)
    assert re.fullmatch(rf"disk: up to .* in {job.work_dir}; .* are free", disk)
    assert time.startswith("time to go: about ")
