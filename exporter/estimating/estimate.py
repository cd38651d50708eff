"""Estimates the hours of a run by arithmetic alone; nothing is measured.

They follow from a few speeds of this machine (:mod:`exporter.estimating.machine`), and are good to a factor of two,
enough for a person to decide whether to wait.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from compressors.calibration.sizes import n_kept_blocks
from compressors.calibration.splits import BLOCK_LENGTH
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.source import Source
from exporter.estimating.durations import format_duration
from exporter.estimating.needs import heldout_blocks, student_bytes, student_differs
from exporter.estimating.planned_types import same_numbers
from exporter.planning.compression import changes_experts, runs_text
from exporter.planning.plan import Plan
from exporter.planning.teacher_floor import first_layers
from validate.metrics.generation import NEW_TOKENS, PROMPT_TOKENS, PROMPTS

__all__ = [
    "COPIED_TYPES",
    "MOST_MEASURED",
    "SENSITIVITY_TOKENS",
    "Speeds",
    "describe_time",
    "seconds_by_stage",
    "seconds_of_measuring",
]

COPIED_TYPES = frozenset({"F32", "BF16"})
"""Types that no quantizer runs for."""

MOST_MEASURED = 5
"""Files of each artifact that a search measures: two of its own, three named mixes."""

SENSITIVITY_TOKENS = 4096
"""Calibration tokens that are enough for sensitivities: with half as many, predictions are as good."""

_SENSITIVITY_FORWARDS = 4  # time of its passes, in forward passes
_START_SECONDS = 4  # until a stage's process has loaded its libraries

_STEP_FORWARDS = 3  # for routers: forward, the same again, and the gradient with respect to the activations
_WEIGHTS_FORWARDS = 1  # one more for the gradient with respect to experts

_CHOOSING_CODES = 3  # times as long as the kernels take, second moments included

_TEXT_PASSES = 16
"""Passes over the original for its texts if a file in 4 bits drafts them (benchmarks/results/texts.md)."""

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


def seconds_by_stage(plan: Plan, speeds: Speeds, free_memory: int) -> dict[str, float]:
    """The approximate seconds of each stage of the plan.

    Reading and computing overlap, so a pass takes as long as the slower of them. A checkpoint that fits into the free
    memory is read from the disk once.
    """
    recipe, teacher, student = plan.recipe, plan.teacher_spec, plan.student_spec
    passes = _Passes(plan.open_source(), speeds, free_memory)
    n_heldout = heldout_blocks(plan)
    n_reference = plan.selection_blocks + n_heldout
    computing = passes.computing(teacher, recipe.text.calibration_blocks, n_reference)
    seconds = {
        "calibrate": max(passes.reading(teacher), computing),
        "compress": _compression(plan, passes),
        **_recovery(plan, passes),
        "teacher_texts": passes.writing(teacher, 2 * min(PROMPTS, n_heldout)),
        # of the original, calibration knows what it says
        "validate_torch": passes.forward(student, n_reference=n_heldout) if student_differs(plan) else 0.0,
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
        seconds["student"] = passes.export(student, "BF16", student_bytes(plan))
    return {stage: _START_SECONDS + value for stage, value in seconds.items()}


def seconds_of_measuring(plan: Plan, speeds: Speeds) -> float:
    """The approximate seconds to write a file of the whole original and to judge it on the selection split."""
    spec = plan.teacher_spec
    passes = _Passes(plan.open_source(), speeds, 0)
    writing = passes.export(spec, "", next(iter(plan.predictions.values())).file, _CHOOSING_CODES)
    return writing + passes.forward(spec, n_reference=plan.recipe.text.selection_blocks)


def describe_time(seconds: Mapping[str, float]) -> str:
    """Formats the total time of the stages, and its parts."""
    parts = {part: sum(seconds.get(stage, 0.0) for stage in stages) for part, stages in _PARTS.items()}
    named = ", ".join(f"{part} {format_duration(value)}" for part, value in parts.items() if value > 0)
    return f"about {format_duration(sum(seconds.values()))} ({named})"


class _Passes:
    """Seconds of one pass over a model."""

    def __init__(self, source: Source, speeds: Speeds, free_memory: int) -> None:
        self._itemsize = source.storage_type.itemsize
        self._speeds = speeds
        self._stays_cached = source.n_bytes < free_memory

    def reading(self, spec: ModelSpec) -> float:
        """Seconds to read all weights from the disk."""
        return spec.parameters * self._itemsize / self._speeds.read_bytes

    def computing(self, spec: ModelSpec, n_blocks: int, n_reference: int) -> float:
        """Seconds of arithmetic for these token blocks, and for others in float32."""
        # attention between the tokens of a block is small beside the matrices
        used = sum(layer.parameters_beside_experts + layer.top_k * layer.expert_parameters for layer in spec.layers)
        per_block = BLOCK_LENGTH * (used + spec.vocab_size * spec.hidden_size)
        speeds = self._speeds
        return per_block * (n_blocks / speeds.multiply_adds + n_reference / speeds.reference_multiply_adds)

    def forward(self, spec: ModelSpec, n_blocks: int = 0, *, n_reference: int = 0) -> float:
        """Seconds to run token blocks through a model that was read before."""
        reading = 0.0 if self._stays_cached else self.reading(spec)
        return max(self.computing(spec, n_blocks, n_reference), reading)

    def writing(self, spec: ModelSpec, n_texts: int) -> float:
        """Seconds to write the texts of the generation gate, which a file drafts: each pass reads the model once.

        A drafted position costs about as much as one of the text; half of them are thrown away.
        """
        n_blocks = 2 * n_texts * (PROMPT_TOKENS + NEW_TOKENS) // BLOCK_LENGTH
        reading = 0.0 if self._stays_cached else _TEXT_PASSES * self.reading(spec)
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
    running = passes.forward(student, n_blocks) if student_differs(plan) else 0.0
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
    spec = first_layers(plan.open_source(), floor.n_layers).spec
    n_passes = 1 if floor.n_layers == plan.teacher_spec.n_layers else 2
    n_chunks = min(floor.n_chunks, heldout_blocks(plan))
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
