"""Estimates the disk and the memory of a run, line by line, by arithmetic alone.

Bytes are upper bounds, apart from a few kilobytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from compressors.calibration.layer_inputs import layer_input_bytes
from compressors.calibration.splits import BLOCK_LENGTH
from compressors.calibration.statistics import LayerStatistics
from compressors.calibration.teacher import TARGET_BYTES
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import Kind
from compressors.model.predictions.log_probs import log_prob_bytes
from compressors.model.running.memory import PROCESS_BYTES, positions_at_once, working_bytes
from compressors.recover.scopes import Scope
from compressors.recover.training_memory import training_bytes
from exporter.estimating.planned_types import planned_block_length, same_numbers
from exporter.planning.compression import changes_experts
from exporter.planning.plan import Plan
from exporter.planning.recovery import scope_of
from exporter.writing.feedback import least_feedback_bytes
from validate.routing.router_inputs import ROUTER_CHUNKS
from validate.runtimes.backend import scored_positions

__all__ = ["disk_lines", "disk_lines_of_all", "heldout_blocks", "memory_lines", "student_bytes", "student_differs"]

_HEADERS = 1 << 16  # bytes of the headers of the sensitivities' files


def disk_lines(plan: Plan) -> dict[str, int]:
    """The most bytes that the run puts into its work directory, by kind."""
    text, spec = plan.recipe.text, plan.teacher_spec
    n_heldout = heldout_blocks(plan)
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
    n_routings = 2 * n_artifacts + (3 + 2 * n_artifacts if plan.student_spec.written.n_experts else 2)
    lines = {
        **{f"{artifact} files": prediction.file for artifact, prediction in plan.predictions.items()},
        "changed experts": _expert_bytes(plan) if changes_experts(plan.recipe.compress) else 0,
        "student checkpoint": student_bytes(plan) if plan.recipe.save_student else 0,
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
        "statistics": len(spec.blocks) * _statistics_bytes(spec) + _own_statistics_bytes(plan),
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
"""Lines that count once for several budgets: made once for all, or for one at a time."""


def disk_lines_of_all(plans: Sequence[Plan]) -> dict[str, int]:
    """Adds up the bytes of several budgets' plans, by kind."""
    total: Counter[str] = Counter()
    for lines in map(disk_lines, plans):
        for what, n_bytes in lines.items():
            total[what] = max(total[what], n_bytes) if what in _OF_ALL_BUDGETS else total[what] + n_bytes
    return dict(total)


def memory_lines(spec: ModelSpec, student: ModelSpec, itemsize: int) -> dict[str, int]:
    """The least memory that the stages need, by purpose; it does not depend on the number of layers.

    Args:
        spec: the source.
        student: the student; the one expert of a dense layer is wider than any of the source's.
        itemsize: bytes of a stored weight.
    """
    layer = max(layer.parameters for layer in spec.layers)
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


def _sensitivity_bytes(spec: ModelSpec) -> int:
    """Float32 bytes of rows and columns of every matrix, two moments of the hidden size, four numbers of each token."""
    hidden, of_layers = spec.hidden_size, sum(_rows_and_columns(layer) for layer in spec.layers)
    return 4 * (of_layers + 2 * hidden * hidden + 2 * hidden + 4 * spec.vocab_size) + _HEADERS


def _rows_and_columns(layer: LayerSpec) -> int:
    """The numbers of rows and of columns of a layer's matrices, all added up."""
    matrices = [tensor for tensor in layer.tensors if tensor.kind is Kind.MATRIX]
    return sum(sum(layer.dimensions(tensor)) * (layer.n_experts if tensor.is_per_expert else 1) for tensor in matrices)


def _search_bytes(plan: Plan) -> int:
    """Bytes of the largest file while it is measured, and of a smaller structure's experts, as built and as trained."""
    if plan.search is None:
        return 0
    return max(prediction.file for prediction in plan.predictions.values()) + 2 * plan.open_source().n_bytes


def heldout_blocks(plan: Plan) -> int:
    """The number of held-out blocks; a folder has as many texts as files, a file or a part set aside from it is one."""
    place = plan.heldout or plan.calibration
    n_files = len(list(place.glob("*.txt"))) if place.is_dir() else 1
    return n_files * plan.recipe.text.heldout_chunks_per_file


def _router_input_bytes(plan: Plan) -> int:
    """Bytes of the inputs of the student's routers on a few held-out blocks, in float32, and of their choices."""
    written = plan.student_spec.written
    n_tokens = min(ROUTER_CHUNKS, heldout_blocks(plan)) * BLOCK_LENGTH
    of_token = (written.hidden_size * 4 + layer.top_k * 8 + 4 for layer in written.layers if layer.routed is not None)
    return n_tokens * sum(of_token)


def student_bytes(plan: Plan) -> int:
    """Bytes of the student's checkpoint: the source's dtype, but routers, if it has any, in float32."""
    shape, itemsize = plan.student_spec, plan.open_source().dtype.itemsize
    return shape.parameters * itemsize + _router_values(shape.written) * (4 - itemsize)


def _expert_bytes(plan: Plan) -> int:
    """Bytes of all of the student's experts in the source's dtype."""
    shape, itemsize = plan.student_spec, plan.open_source().dtype.itemsize
    return sum(layer.n_experts * layer.expert_parameters for layer in shape.layers) * itemsize


def _training_bytes(plan: Plan) -> int:
    """Bytes of every layer's input in a step, and of two snapshots of the trained tensors and their two moments.

    The results of each rung are kept too: routers in float32, experts in storage dtype.
    """
    spec, choice = plan.student_spec, plan.recipe.recover
    if not choice.trained:
        return 0
    layer_inputs = (
        (spec.n_layers + 1) * max(rung.blocks_per_step for rung in choice.trained) * BLOCK_LENGTH * spec.hidden_size * 4
    )
    # among the files that are trained separately, the one with the shortest blocks has the most factors
    lengths = [planned_block_length(plan.recipe, artifact, spec) for artifact in plan.recipe.artifacts]
    snapshots = (
        2
        * 3
        * max(training_bytes(scope_of(rung), spec, length).weights for rung in choice.trained for length in lengths)
    )
    n_with_experts = sum(rung.scope not in ("router", "norms") for rung in choice.rungs)
    taught = len(choice.trained) * 4 * _router_values(spec) + n_with_experts * _expert_bytes(plan)
    return layer_inputs + snapshots + taught + _tunable_bytes(plan)


def _tunable_bytes(plan: Plan) -> int:
    """Bytes of the values that each file was written with, and of their replacements: two float16 scales a block."""
    spec, choice = plan.student_spec, plan.recipe.recover
    if choice.after_quantizing is None:
        return 0
    n_values = 0
    for artifact in plan.recipe.artifacts:
        block_length = planned_block_length(plan.recipe, artifact, spec)
        n_values += training_bytes(Scope.block_scales(), spec, block_length).weights // 4
    return 2 * n_values * 4


def _router_values(spec: ModelSpec) -> int:
    routers = [(layer, tensor) for layer in spec.layers for tensor in layer.tensors if tensor.kind is Kind.ROUTER]
    return sum(layer.n_values(tensor) for layer, tensor in routers)


def _student_layer_input_bytes(plan: Plan) -> int:
    """Bytes of the layer inputs of a student that differs from the original, if error feedback chooses codes."""
    recipe = plan.recipe
    if not (recipe.chooses_codes and student_differs(plan)):
        return 0
    return layer_input_bytes(plan.student_spec, recipe.text.calibration_blocks * BLOCK_LENGTH)


def student_differs(plan: Plan) -> bool:
    """True if the inputs of the student's layers differ from those of the original's."""
    shrunk = plan.student_spec != plan.teacher_spec or changes_experts(plan.recipe.compress)
    return shrunk or bool(plan.recipe.recover.rungs)


def _own_statistics_bytes(plan: Plan) -> int:
    """Bytes of the statistics of a student whose experts changed; they are kept beside the teacher's."""
    spec = plan.student_spec
    return spec.n_layers * _statistics_bytes(spec) if changes_experts(plan.recipe.compress) else 0


def _statistics_bytes(spec: ModelSpec) -> int:
    """Bytes of the largest layer's statistics."""
    with torch.device("meta"):
        return max(LayerStatistics.zeros(layer).n_bytes for layer in spec.layers)
