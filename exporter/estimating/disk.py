"""Estimates the disk of a run by arithmetic alone: for each stage, what lies in the work folder while it runs.

A file is there from its stage on until no stage to come reads it (:func:`exporter.pipeline.order.needless`), so the
need of a run is that of its fullest stage. Bytes are upper bounds, apart from a few kilobytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from compressors.calibration.sizes import (
    TARGET_BYTES,
    head_input_bytes,
    layer_input_bytes,
    log_prob_bytes,
    n_kept_blocks,
)
from compressors.calibration.splits import BLOCK_LENGTH
from compressors.model.running.arithmetic import value_bytes
from exporter import file_names
from exporter.estimating.needs import (
    changed_expert_bytes,
    heldout_blocks,
    router_input_bytes,
    sensitivity_bytes,
    statistics_bytes,
    student_bytes,
    student_differs,
    taught_bytes,
    tunable_bytes,
)
from exporter.estimating.passing import (
    compressing_bytes,
    gathering_bytes,
    state_bytes,
    text_bytes,
    training_step_bytes,
)
from exporter.estimating.planned_types import same_numbers
from exporter.estimating.search_disk import search_lines
from exporter.estimating.taken_inputs import inputs_beside_file
from exporter.file_names import StageFile
from exporter.pipeline.order import needless, search_stages, stages_of, taken
from exporter.planning.compression import changes_experts
from exporter.planning.plan import Plan
from exporter.stages.table import ALL_STAGES, OF_ALL_FILES
from exporter.work.stage import Stage
from validate.runtimes.backend import scored_positions

__all__ = ["disk_by_stage", "disk_lines", "disk_lines_of_all", "output_lines"]

_Files = Mapping[tuple[str, StageFile], tuple[str, int]]


def disk_lines(plan: Plan, to_come: Collection[str] | None = None) -> dict[str, int]:
    """The bytes in the work folder of a run while the fullest of all, or of these, stages runs, by kind."""
    by_stage = disk_by_stage(plan)
    counted = [lines for stage, lines in by_stage.items() if to_come is None or stage in to_come]
    return max(counted or [*by_stage.values()][-1:], key=_total)


def disk_lines_of_all(plans: Sequence[Plan]) -> dict[str, int]:
    """The same for the plans of several budgets: what others leave lies there too, and what they share stays."""
    if len(plans) == 1:
        return disk_lines(plans[0])
    left = [_left(plan) for plan in plans]
    found = []
    for number, plan in enumerate(plans):
        others: Counter[str] = Counter()
        for of_other in (lines for index, lines in enumerate(left) if index != number):
            others.update(of_other)
        found += [dict(others + Counter(lines)) for lines in disk_by_stage(plan, OF_ALL_FILES).values()]
    return max(found, key=_total)


def output_lines(plan: Plan) -> dict[str, int]:
    """The bytes of what a run writes into OUT, by kind."""
    lines = {f"{artifact} files": prediction.file for artifact, prediction in plan.predictions.items()}
    return lines | ({"student checkpoint": student_bytes(plan)} if plan.recipe.save_student else {})


def disk_by_stage(plan: Plan, kept: Collection[str] = ()) -> dict[str, dict[str, int]]:
    """For each stage of a run the bytes in its work folder while it runs, by kind.

    Args:
        plan: the plan.
        kept: stages whose files stay, because other runs need them.
    """
    stages, files, passing = _stages(plan), _files(plan), _passing(plan)
    found = {}
    for number, stage in enumerate(stages):
        lines = _lying(plan, files, stages[: number + 1], stages[number:], kept)
        for writer, file in files.keys() & taken(plan, stage, stages[number + 1 :]):
            if writer not in kept:
                what, n_bytes = files[writer, file]
                lines[what] += _beside_file(plan, stage.name) - n_bytes
        lines.update(passing.get(stage.name, {}))
        found[stage.name] = dict(+lines)
    if plan.shard_bytes is not None and "gguf" in plan.predictions:  # the file and its parts lie there together
        found[stages[-1].name]["parts of the GGUF file"] = plan.predictions["gguf"].file
    return found


def _left(plan: Plan) -> Counter[str]:
    """The bytes that a run leaves of its own when it is finished, until all others are."""
    stages = _stages(plan)
    return _lying(plan, _files(plan), [stage for stage in stages if stage.name not in OF_ALL_FILES], [], ())


def _lying(
    plan: Plan, files: _Files, written: Sequence[Stage], to_come: Sequence[Stage], kept: Collection[str]
) -> Counter[str]:
    """The files of these stages, without those that no stage to come needs."""
    names = {stage.name for stage in written}
    gone = {
        (stage, file)
        for stage, unneeded in needless(plan, [stage for stage in written if stage not in to_come], to_come).items()
        for file in unneeded
        if stage not in kept
    }
    lines: Counter[str] = Counter()
    for (stage, file), (what, n_bytes) in files.items():
        if stage in names and (stage, file) not in gone:
            lines[what] += n_bytes
    return lines


def _total(lines: dict[str, int]) -> int:
    return sum(lines.values())


def _stages(plan: Plan) -> list[Stage]:
    """All stages of a run: with the search, if there is one."""
    wanted = {*stages_of(plan), *(search_stages(plan) if plan.search is not None else ())}
    return [stage for stage in ALL_STAGES if stage in wanted]


def _files(plan: Plan) -> _Files:
    """The kind and the bytes of each file that a stage leaves, apart from those of a few kilobytes."""
    names, spec, student, recipe = file_names, plan.teacher_spec, plan.student_spec, plan.recipe
    n_heldout, n_calibration = heldout_blocks(plan), recipe.text.calibration_blocks
    blocks = n_calibration + plan.selection_blocks + n_heldout
    changed = changes_experts(recipe.compress)
    files = {
        ("calibrate", names.BLOCKS): ("token blocks", blocks * BLOCK_LENGTH * 8),
        ("calibrate", names.STATISTICS): ("statistics", statistics_bytes(spec)),
        ("calibrate", names.SELECTION_PREDICTIONS): _predictions(plan, plan.selection_blocks),
        ("calibrate", names.HELDOUT_PREDICTIONS): _predictions(plan, n_heldout),
        ("calibrate", names.ROUTING): _routing(plan, n_heldout),
        ("sensitivity", names.SENSITIVITIES): ("sensitivities", sensitivity_bytes(spec)),
        ("compress", names.OVERLAY): ("changed experts", changed_expert_bytes(plan)),
        ("compress", names.STATISTICS): ("statistics", statistics_bytes(student) if changed else 0),
        ("recover", names.RUNG_OVERLAY): ("what recovery taught", taught_bytes(plan)),
        ("student", names.STUDENT_FOLDER): ("student checkpoint", student_bytes(plan)),
        ("validate_torch", names.EVALUATION): _evaluation(plan, n_heldout),
    }
    if plan.keeps_layer_inputs:
        inputs = layer_input_bytes(spec, n_calibration * BLOCK_LENGTH)
        files["calibrate", names.LAYER_INPUTS] = ("layer inputs", inputs)
    if plan.keeps_targets:
        targets = n_calibration * BLOCK_LENGTH * TARGET_BYTES
        files["calibrate", names.TARGETS] = ("training targets", targets)
    for artifact, prediction in plan.predictions.items():
        written = names.GGUF_FILE if artifact == "gguf" else names.ONNX_FOLDER
        files |= {
            (artifact, written): (f"{artifact} files", prediction.file),
            (artifact, names.ORIGINAL_VALUES): ("training", tunable_bytes(plan, artifact)),
            ("retune", names.RETUNED[artifact]): ("training", tunable_bytes(plan, artifact)),
            (f"validate_{artifact}", names.EVALUATION): _evaluation(plan, n_heldout),
            (f"teacher_{artifact}", names.EVALUATION): _routing(plan, n_heldout),
            (f"teacher_{artifact}", names.ROUTING): _routing(plan, n_heldout),
        }
    n_different = 1 if same_numbers(plan) else len(recipe.artifacts)
    for file, (what, n_bytes) in {
        names.WRITTEN_EVALUATION: _evaluation(plan, n_heldout),
        names.WRITTEN_PREDICTIONS: _predictions(plan, n_heldout),
        names.ROUTER_INPUTS: ("router inputs", router_input_bytes(plan)),
    }.items():
        files["validate_written", file] = (what, n_different * n_bytes)
    if same_numbers(plan):  # the GGUF's, for the ONNX file to be compared with
        recorded = log_prob_bytes(_n_scored(n_heldout), spec.vocab_size)
        files["validate_gguf", names.LOG_PROBS] = ("log-probabilities in 16 bits", recorded)
    return files


def _passing(plan: Plan) -> dict[str, dict[str, int]]:
    """The bytes that each stage needs beside its files while it runs, by kind, if no hidden states fit in memory."""
    text, recipe, n_heldout = plan.recipe.text, plan.recipe, heldout_blocks(plan)
    in_calibration = text.calibration_blocks * value_bytes(recipe.arithmetic)
    in_float32 = 4 * (plan.selection_blocks + n_heldout)
    floor = {f"teacher_{name}": floor.file_bytes for name, floor in plan.teacher_floors.items()}
    judging = _states(state_bytes(plan, 4 * text.selection_blocks))
    measuring = _states(state_bytes(plan, 4 * n_heldout))
    passing = {
        "calibrate": _calibrating(plan, state_bytes(plan, in_calibration + in_float32)),
        "sensitivity": _states(gathering_bytes(plan)),
        "search": search_lines(plan),
        "compress": _states(compressing_bytes(plan)),
        "teacher_texts": {"keys and values of texts": text_bytes(plan)},
        "validate_torch": measuring,
        "validate_written": measuring,
    }
    for stage in ("schedule", "recover", "retune"):
        passing[stage] = {"training": training_step_bytes(plan, stage)} | judging
    for artifact in recipe.artifacts:
        passing[artifact] = _choosing_codes(plan, artifact)
    for stage, n_bytes in floor.items():
        passing[stage] = {"the original, unquantized, while it is measured": n_bytes} | measuring
    return passing


def _calibrating(plan: Plan, states: int) -> dict[str, int]:
    """The hidden states in use, and the newest snapshot of them, which goes before the last files are written.

    Routing is kept by layer until it is put together.
    """
    text, spec = plan.recipe.text, plan.teacher_spec
    last = _predictions(plan, plan.selection_blocks)[1] + _predictions(plan, heldout_blocks(plan))[1]
    last += text.calibration_blocks * BLOCK_LENGTH * TARGET_BYTES if plan.keeps_targets else 0
    if plan.keeps_layer_inputs:  # the head's
        last += layer_input_bytes(spec, text.calibration_blocks * BLOCK_LENGTH) // (spec.n_layers + 1)
    return {"hidden states": max(states, 2 * states - last)} | dict([_routing(plan, heldout_blocks(plan))])


def _routing(plan: Plan, n_blocks: int) -> tuple[str, int]:
    """The original's chosen experts and gate weights, 4 bytes each, a margin, and the figures of each token."""
    n_layers, top_k = plan.teacher_spec.n_layers, plan.teacher_spec.top_k
    return "routing", n_blocks * BLOCK_LENGTH * (n_layers * (top_k * 8 + 4) + _FIGURES)


def _evaluation(plan: Plan, n_blocks: int) -> tuple[str, int]:
    """The same of the student; a dense one has figures alone."""
    is_dense = not plan.student_spec.written.n_experts
    return ("routing", n_blocks * BLOCK_LENGTH * _FIGURES) if is_dense else _routing(plan, n_blocks)


_FIGURES = 64  # bytes of a token: four numbers beside each of at most three references, and its own


def _predictions(plan: Plan, n_blocks: int) -> tuple[str, int]:
    return "predictions", head_input_bytes(_n_scored(n_blocks), plan.teacher_spec.hidden_size)


def _n_scored(n_blocks: int) -> int:
    scored = scored_positions(BLOCK_LENGTH)
    return n_blocks * int(scored.stop - scored.start)


def _states(n_bytes: int) -> dict[str, int]:
    return {"hidden states": n_bytes}


def _choosing_codes(plan: Plan, artifact: str) -> dict[str, int]:
    """The layer inputs of a student that differs from the original, and its hidden states, if it chooses codes."""
    recipe = plan.recipe
    if recipe.file(artifact).quantizer == "kernel" or not student_differs(plan):
        return {}
    n_blocks = n_kept_blocks(recipe.text.calibration_blocks, BLOCK_LENGTH)
    inputs = layer_input_bytes(plan.student_spec, n_blocks * BLOCK_LENGTH)
    states = state_bytes(plan, n_blocks * value_bytes(recipe.arithmetic))
    before_the_file = inputs + states - plan.predictions[artifact].file
    return {"layer inputs of the student, while codes are chosen": max(_beside_file(plan, artifact), before_the_file)}


def _beside_file(plan: Plan, artifact: str) -> int:
    """The bytes of the layer inputs that a file uses up, beyond those of the whole file."""
    n_blocks = n_kept_blocks(plan.recipe.text.calibration_blocks, BLOCK_LENGTH)
    choice = plan.recipe.file(artifact)
    return inputs_beside_file(artifact, plan.student_spec, choice, n_blocks * BLOCK_LENGTH)
