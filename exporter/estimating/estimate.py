"""Estimates the disk and memory of a run, line by line, and its hours, by arithmetic alone; nothing is measured.

Bytes are upper bounds but for a few kilobytes. Hours follow from a few speeds of this machine
(:mod:`exporter.estimating.machine`); they are good to a factor of two, enough for a person to decide whether to wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from compressors.calibration.layer_inputs import layer_input_bytes, n_kept_blocks
from compressors.calibration.splits import BLOCK_LENGTH
from compressors.calibration.statistics import LayerStatistics
from compressors.calibration.teacher import TARGET_BYTES
from compressors.model.description.spec import ModelSpec
from compressors.model.predictions.log_probs import log_prob_bytes
from compressors.model.running.memory import PROCESS_BYTES, positions_at_once, working_bytes
from compressors.model.sources.checkpoint import Checkpoint
from compressors.recover.scopes import Scope
from compressors.recover.training_memory import training_bytes
from exporter.estimating.durations import format_duration
from exporter.estimating.planned_types import planned_block_length, same_numbers
from exporter.planning.compression import changes_experts, runs_text
from exporter.planning.plan import Plan
from exporter.planning.recovery import scope_of
from exporter.planning.teacher_floor import first_layers
from exporter.writing.feedback import least_feedback_bytes
from validate.metrics.generation import NEW_TOKENS, PROMPT_TOKENS, PROMPTS
from validate.routing.router_inputs import ROUTER_CHUNKS
from validate.runtimes.backend import scored_positions

__all__ = [
    "COPIED_TYPES",
    "MOST_MEASURED",
    "SENSITIVITY_TOKENS",
    "Speeds",
    "describe_time",
    "disk_lines",
    "disk_lines_of_all",
    "memory_lines",
    "seconds_by_stage",
    "seconds_of_measuring",
]

COPIED_TYPES = frozenset({"F32", "BF16"})
"""Types that no quantizer runs for."""

MOST_MEASURED = 5
"""Files of each artifact that a search measures: two of its own, three named mixes."""

SENSITIVITY_TOKENS = 4096
"""Calibration tokens that are enough for sensitivities: with half as many, predictions are as good."""

_HEADERS = 1 << 16  # of the sensitivities' files
_SENSITIVITY_FORWARDS = 4  # time of its passes, in forward passes
_START_SECONDS = 4  # until a stage's process has loaded its libraries

_STEP_FORWARDS = 3  # of routers: forward, the same again, and the gradient with respect to the activations
_WEIGHTS_FORWARDS = 1  # more for the gradient with respect to experts

_CHOOSING_CODES = 3  # times as long as the kernels take, second moments included

_PARTS: Mapping[str, Collection[str]] = {
    "calibration": ("calibrate", "compress"),
    "search": ("sensitivity", "search"),
    "recovery": ("schedule", "recover", "retune"),
    "writing": ("gguf", "onnx", "student"),
    "validation": (
        *("teacher_texts", "validate_torch", "validate_written", "validate_gguf", "validate_onnx"),
        *("teacher_gguf", "teacher_onnx"),
    ),
}
"""The stages in each part of the time that is shown to people."""


@dataclass(frozen=True)
class Speeds:
    """The work that this machine does in a second, with a model's own sizes and types."""

    read_bytes: float  # from the disk that the checkpoint is on
    multiply_adds: float  # in products of the experts' size, in the arithmetic of calibration and recovery
    reference_multiply_adds: float  # the same in float32, in which everything that is reported is computed
    quantized_values: float  # in all threads together


def disk_lines(plan: Plan) -> dict[str, int]:
    """The most bytes that the run puts into its work directory, by kind."""
    text, spec = plan.recipe.text, plan.teacher_spec
    n_heldout = _heldout_blocks(plan)
    n_blocks = text.calibration_blocks + text.selection_blocks + n_heldout
    scored = scored_positions(BLOCK_LENGTH)
    # the teacher's; for the held-out text also torch's with each file's numbers and, if they are the same, the GGUF's
    recorded_blocks = text.selection_blocks + n_heldout * (
        1 + (2 if same_numbers(plan) else len(plan.recipe.artifacts))
    )
    n_scored = (scored.stop - scored.start) * recorded_blocks
    # chosen experts and gate weights, 4 bytes each, and a margin: the teacher's by layer and together, the student's,
    # each artifact's in its runtime and in torch; some chunks of the original in each runtime and in torch
    n_artifacts = len(plan.recipe.artifacts)
    n_routings = 2 * n_artifacts + (2 if plan.student_spec.is_dense else 3 + 2 * n_artifacts)
    lines = {
        **{f"{artifact} files": prediction.file for artifact, prediction in plan.predictions.items()},
        "changed experts": _expert_bytes(plan) if changes_experts(plan.recipe.compress) else 0,
        "student checkpoint": _student_bytes(plan) if plan.recipe.save_student else 0,
        # those in use, the newest snapshot, and the next one while it is written
        "hidden states": 3 * n_blocks * BLOCK_LENGTH * spec.hidden_size * 4,
        "layer inputs": layer_input_bytes(spec, text.calibration_blocks * BLOCK_LENGTH),
        "layer inputs of the student, while codes are chosen": _student_layer_input_bytes(plan),
        "log-probabilities in 16 bits": log_prob_bytes(n_scored, spec.vocab_size),
        "training targets": text.calibration_blocks * BLOCK_LENGTH * TARGET_BYTES,
        "training": _training_bytes(plan),
        "the original, unquantized, while it is measured": max(
            (floor.file_bytes for floor in plan.teacher_floors.values()), default=0
        ),
        "routing": n_routings * n_heldout * BLOCK_LENGTH * spec.n_layers * (spec.top_k * 8 + 4),
        "router inputs": (1 if same_numbers(plan) else len(plan.recipe.artifacts)) * _router_input_bytes(plan),
        "statistics": spec.n_layers * _statistics_bytes(spec) + _own_statistics_bytes(plan),
        "sensitivities": _sensitivity_bytes(spec) if plan.search is not None or plan.recipe.chooses_codes else 0,
        "what the search looks at": _search_bytes(plan),
        "token blocks": n_blocks * BLOCK_LENGTH * 8,
    }
    return {what: n_bytes for what, n_bytes in lines.items() if n_bytes}


_OF_ALL_BUDGETS = (
    *("hidden states", "layer inputs", "training targets", "sensitivities", "token blocks"),
    *("training", "layer inputs of the student, while codes are chosen"),
    "the original, unquantized, while it is measured",
)
"""Lines of which several budgets have one: made once for all, or there for one at a time."""


def disk_lines_of_all(plans: Sequence[Plan]) -> dict[str, int]:
    """Adds up the bytes of several budgets' plans, by what they are."""
    total: Counter[str] = Counter()
    for lines in map(disk_lines, plans):
        for what, n_bytes in lines.items():
            total[what] = max(total[what], n_bytes) if what in _OF_ALL_BUDGETS else total[what] + n_bytes
    return dict(total)


def memory_lines(spec: ModelSpec, student: ModelSpec, itemsize: int) -> dict[str, int]:
    """The least memory that the stages need, by purpose; it does not depend on the number of layers.

    Args:
        spec: the source's shape.
        student: the student's shape; the one expert of a dense layer is wider than any of the source's.
        itemsize: bytes of a stored weight.
    """
    layer = spec.layer_parameters
    head = spec.vocab_size * spec.hidden_size
    lines = {
        # one computes while the next is read; the head is read when the layers are gone, and widened
        "two decoder layers" if layer >= head else "the head": 2 * max(layer, head) * itemsize,
        "activations and an expert in float32": max(working_bytes(spec), working_bytes(student)),
        "logits": positions_at_once(spec.vocab_size) * spec.vocab_size * 4,
    }
    more = least_feedback_bytes(student) - sum(lines.values())
    if more > 0:  # where experts are few and wide
        lines["what enters an expert, while its codes are chosen"] = more
    return lines | {"the process itself": PROCESS_BYTES}


def seconds_by_stage(plan: Plan, speeds: Speeds, free_memory: int) -> dict[str, float]:
    """The approximate seconds of each stage of the plan.

    Reading and computing overlap, so a pass takes as long as the slower of them. A checkpoint that fits into the free
    memory is read from the disk once.
    """
    recipe, teacher, student = plan.recipe, plan.teacher_spec, plan.student_spec
    passes = _Passes(Checkpoint(plan.source), speeds, free_memory)
    n_heldout = _heldout_blocks(plan)
    n_reference = recipe.text.selection_blocks + n_heldout
    computing = passes.computing(teacher, recipe.text.calibration_blocks, n_reference)
    seconds = {
        "calibrate": max(passes.reading(teacher), computing),
        "compress": _compression(plan, passes),
        **_recovery(plan, passes),
        "teacher_texts": passes.writing(teacher, 2 * min(PROMPTS, n_heldout)),
        "validate_torch": passes.forward(student, n_reference=n_heldout),
    }
    for artifact in plan.predictions:
        seconds[artifact] = _file_seconds(plan, passes, artifact)
        # held-out text, and a cache that is filled to see what that costs
        n_blocks = n_heldout + recipe.budget.context // BLOCK_LENGTH
        seconds[f"validate_{artifact}"] = passes.forward(student, n_reference=n_blocks)
    n_different = 1 if same_numbers(plan) else len(plan.predictions)
    seconds["validate_written"] = n_different * passes.forward(student, n_reference=n_heldout)
    seconds |= {f"teacher_{artifact}": _teacher_seconds(plan, passes, artifact) for artifact in plan.teacher_floors}
    if recipe.chooses_codes:
        seconds["sensitivity"] = _SENSITIVITY_FORWARDS * passes.forward(teacher, SENSITIVITY_TOKENS // BLOCK_LENGTH)
    if plan.search is not None:
        measuring = MOST_MEASURED * len(recipe.artifacts) * seconds_of_measuring(plan, speeds)
        seconds["search"] = passes.reading(teacher) + min(plan.search.plan_seconds, measuring)
    if recipe.save_student:
        seconds["student"] = passes.export(student, "BF16", _student_bytes(plan))
    return {stage: _START_SECONDS + value for stage, value in seconds.items()}


def seconds_of_measuring(plan: Plan, speeds: Speeds) -> float:
    """The approximate seconds to write a file of the whole original and to judge it on the selection split."""
    spec = plan.teacher_spec
    passes = _Passes(Checkpoint(plan.source), speeds, 0)
    writing = passes.export(spec, "", next(iter(plan.predictions.values())).file, _CHOOSING_CODES)
    return writing + passes.forward(spec, n_reference=plan.recipe.text.selection_blocks)


def describe_time(seconds: Mapping[str, float]) -> str:
    """Formats the total time of the stages, and its parts."""
    parts = {part: sum(seconds.get(stage, 0.0) for stage in stages) for part, stages in _PARTS.items()}
    named = ", ".join(f"{part} {format_duration(value)}" for part, value in parts.items() if value > 0)
    return f"about {format_duration(sum(seconds.values()))} ({named})"


class _Passes:
    """Seconds of one pass over a model."""

    def __init__(self, source: Checkpoint, speeds: Speeds, free_memory: int) -> None:
        self._itemsize = source.dtype.itemsize
        self._speeds = speeds
        self._stays_cached = source.n_bytes < free_memory

    def reading(self, spec: ModelSpec) -> float:
        """Seconds to read all weights from the disk."""
        return spec.parameters * self._itemsize / self._speeds.read_bytes

    def computing(self, spec: ModelSpec, n_blocks: int, n_reference: int) -> float:
        """Seconds of arithmetic for these token blocks, and for others in float32."""
        # attention between the tokens of a block is small beside the matrices
        layer = spec.dense_layer_parameters + spec.top_k * spec.expert_parameters
        per_block = BLOCK_LENGTH * (spec.n_layers * layer + spec.vocab_size * spec.hidden_size)
        speeds = self._speeds
        return per_block * (n_blocks / speeds.multiply_adds + n_reference / speeds.reference_multiply_adds)

    def forward(self, spec: ModelSpec, n_blocks: int = 0, *, n_reference: int = 0) -> float:
        """Seconds to run token blocks through a model that was read before."""
        reading = 0.0 if self._stays_cached else self.reading(spec)
        return max(self.computing(spec, n_blocks, n_reference), reading)

    def writing(self, spec: ModelSpec, n_texts: int) -> float:
        """Seconds to write the texts of the generation gate: each new token of all texts reads the model once."""
        n_blocks = n_texts * (PROMPT_TOKENS + NEW_TOKENS) // BLOCK_LENGTH
        reading = 0.0 if self._stays_cached else NEW_TOKENS * self.reading(spec)
        return max(self.computing(spec, 0, n_blocks), reading)

    def export(self, spec: ModelSpec, weight_type: str, n_bytes: int, slower: float = 1.0) -> float:
        """Seconds to quantize, ``slower`` times as long as the kernels, and to write no faster than the disk reads."""
        quantizing = 0.0 if weight_type in COPIED_TYPES else slower * spec.parameters / self._speeds.quantized_values
        reading = 0.0 if self._stays_cached else self.reading(spec)
        return max(quantizing, reading + n_bytes / self._speeds.read_bytes)


def _file_seconds(plan: Plan, passes: _Passes, artifact: str) -> float:
    """Seconds to write a file; to choose codes, a student that differs from the original first runs on the text."""
    choice, student, n_bytes = plan.recipe.file(artifact), plan.student_spec, plan.predictions[artifact].file
    if choice.quantizer == "kernel" or choice.mix in COPIED_TYPES:
        return passes.export(student, choice.mix, n_bytes)
    n_blocks = n_kept_blocks(plan.recipe.text.calibration_blocks, BLOCK_LENGTH)
    running = passes.forward(student, n_blocks) if _student_differs(plan) else 0.0
    return running + passes.export(student, choice.mix, n_bytes, slower=_CHOOSING_CODES)


def _compression(plan: Plan, passes: _Passes) -> float:
    """Seconds of a pass over the text that methods see, and of one for the statistics of changed experts."""
    choice, n_blocks = plan.recipe.compress, plan.recipe.text.calibration_blocks
    n_seen = n_blocks if choice.sequential else min(choice.sample_blocks, n_blocks)
    looking = passes.forward(plan.teacher_spec, n_seen) if runs_text(choice, plan.teacher_spec) else 0.0
    return looking + (passes.forward(plan.student_spec, n_blocks) if changes_experts(choice) else 0.0)


def _teacher_seconds(plan: Plan, passes: _Passes, artifact: str) -> float:
    """Seconds to write the original's first layers and run a few chunks, twice if these are not all of its layers."""
    floor = plan.teacher_floors[artifact]
    spec = first_layers(Checkpoint(plan.source), floor.n_layers).spec
    n_passes = 1 if floor.n_layers == plan.teacher_spec.n_layers else 2
    n_chunks = min(floor.n_chunks, _heldout_blocks(plan))
    writing = passes.export(spec, floor.weight_type, floor.file_bytes)
    return writing + n_passes * passes.forward(spec, n_reference=n_chunks)


def _recovery(plan: Plan, passes: _Passes) -> dict[str, float]:
    choice, limit = plan.recipe.recover, plan.recover_seconds
    if not choice.trained:
        return {}
    judging = passes.forward(plan.student_spec, n_reference=plan.recipe.text.selection_blocks)
    steps = [
        passes.forward(plan.student_spec, rung.blocks_per_step)
        * (_STEP_FORWARDS + (0 if rung.scope in ("router", "norms") else _WEIGHTS_FORWARDS))
        for rung in choice.trained
    ]
    training = [step * rung.blocks / rung.blocks_per_step for step, rung in zip(steps, choice.trained, strict=True)]
    n_rungs, n_files = len(choice.rungs), 1 if same_numbers(plan) else len(plan.recipe.artifacts)
    training[n_rungs:] = training[n_rungs:] * n_files  # each file by itself
    shorter = min(1.0, limit / sum(training)) if limit else 1.0
    seconds = {"schedule": sum(steps) if limit else 0.0}
    for stage, rungs in (("recover", slice(0, n_rungs)), ("retune", slice(n_rungs, None))):
        if training[rungs]:  # judged before, and after each
            n_begun = n_files if stage == "retune" else 1
            seconds[stage] = shorter * sum(training[rungs]) + (n_begun + len(training[rungs])) * judging
    return seconds


def _sensitivity_bytes(spec: ModelSpec) -> int:
    """Float32 bytes of rows and columns of every matrix, two moments of the hidden size, four numbers of each token."""
    hidden, width = spec.hidden_size, spec.expert_width
    attention = (2 * spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim + 4 * hidden
    of_layer = 3 * spec.n_experts * (hidden + width) + attention
    return 4 * (spec.n_layers * of_layer + 2 * hidden * hidden + 2 * hidden + 4 * spec.vocab_size) + _HEADERS


def _search_bytes(plan: Plan) -> int:
    """Bytes of the largest file while it is measured, and of a smaller structure's experts, as built and as trained."""
    if plan.search is None:
        return 0
    return max(prediction.file for prediction in plan.predictions.values()) + 2 * Checkpoint(plan.source).n_bytes


def _heldout_blocks(plan: Plan) -> int:
    """The number of held-out blocks; a folder has as many texts as files, a file or a part set aside from it is one."""
    place = plan.heldout or plan.calibration
    n_files = len(list(place.glob("*.txt"))) if place.is_dir() else 1
    return n_files * plan.recipe.text.heldout_chunks_per_file


def _router_input_bytes(plan: Plan) -> int:
    """Bytes of the inputs of the student's routers on a few held-out blocks, in float32, and of their choices."""
    shape = plan.student_spec
    if shape.is_dense:
        return 0
    n_tokens = min(ROUTER_CHUNKS, _heldout_blocks(plan)) * BLOCK_LENGTH
    return n_tokens * shape.n_layers * (shape.hidden_size * 4 + shape.top_k * 8 + 4)


def _student_bytes(plan: Plan) -> int:
    """Bytes of the student's checkpoint: the source's dtype, but routers, if it has any, in float32."""
    shape, itemsize = plan.student_spec, Checkpoint(plan.source).dtype.itemsize
    n_router_values = 0 if shape.is_dense else _router_values(shape)
    return shape.parameters * itemsize + n_router_values * (4 - itemsize)


def _expert_bytes(plan: Plan) -> int:
    """Bytes of all of the student's experts in the source's dtype."""
    shape, itemsize = plan.student_spec, Checkpoint(plan.source).dtype.itemsize
    layers = map(shape.layer, range(shape.n_layers))
    return sum(layer.n_experts * layer.expert_parameters for layer in layers) * itemsize


def _training_bytes(plan: Plan) -> int:
    """Bytes of every layer's input in a step, and of two snapshots of the trained tensors and their two moments.

    The results of each rung are kept too: routers in float32, experts in storage dtype.
    """
    shape, choice = plan.student_spec, plan.recipe.recover
    if not choice.trained:
        return 0
    layer_inputs = (
        (shape.n_layers + 1)
        * max(rung.blocks_per_step for rung in choice.trained)
        * BLOCK_LENGTH
        * shape.hidden_size
        * 4
    )
    # among the files that are trained separately, the one with the shortest blocks has the most factors
    lengths = [planned_block_length(plan.recipe, artifact, shape) for artifact in plan.recipe.artifacts]
    snapshots = (
        2
        * 3
        * max(training_bytes(scope_of(rung), shape, length).weights for rung in choice.trained for length in lengths)
    )
    n_with_experts = sum(rung.scope not in ("router", "norms") for rung in choice.rungs)
    taught = len(choice.trained) * 4 * _router_values(shape) + n_with_experts * _expert_bytes(plan)
    return layer_inputs + snapshots + taught + _tunable_bytes(plan)


def _tunable_bytes(plan: Plan) -> int:
    """Bytes of the values that each file was written with, and of their replacements: two float16 scales a block."""
    shape, choice = plan.student_spec, plan.recipe.recover
    if choice.after_quantizing is None:
        return 0
    n_values = 0
    for artifact in plan.recipe.artifacts:
        block_length = planned_block_length(plan.recipe, artifact, shape)
        n_values += training_bytes(Scope.block_scales(), shape, block_length).weights // 4
    return 2 * n_values * 4


def _router_values(spec: ModelSpec) -> int:
    return spec.n_layers * spec.n_experts * spec.hidden_size


def _student_layer_input_bytes(plan: Plan) -> int:
    """Bytes of the layer inputs of a student that differs from the original, if error feedback chooses codes."""
    recipe = plan.recipe
    if not (recipe.chooses_codes and _student_differs(plan)):
        return 0
    return layer_input_bytes(plan.student_spec, recipe.text.calibration_blocks * BLOCK_LENGTH)


def _student_differs(plan: Plan) -> bool:
    """True if the inputs of the student's layers differ from those of the original's."""
    shrunk = plan.student_spec != plan.teacher_spec or changes_experts(plan.recipe.compress)
    return shrunk or bool(plan.recipe.recover.rungs)


def _own_statistics_bytes(plan: Plan) -> int:
    """Bytes of the statistics of a student whose experts changed; they are kept beside the teacher's."""
    shape = plan.student_spec
    return shape.n_layers * _statistics_bytes(shape) if changes_experts(plan.recipe.compress) else 0


def _statistics_bytes(spec: ModelSpec) -> int:
    """Bytes of the largest layer's statistics."""
    with torch.device("meta"):
        return max(LayerStatistics.zeros(layer).n_bytes for layer in spec.layers)
