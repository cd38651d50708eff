"""Estimates the disk of a search: a layer of a file that is measured, and a structure smaller than the original."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from statistics import fmean

from compressors.calibration.sizes import n_kept_blocks
from compressors.calibration.splits import BLOCK_LENGTH
from compressors.model.description.spec import ModelSpec
from compressors.model.running.arithmetic import value_bytes
from compressors.model.sources.narrowed import narrowed_bytes
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refusal
from exporter.estimating.needs import changed_expert_bytes, sensitivity_bytes, statistics_bytes, taught_bytes
from exporter.estimating.passing import compressing_bytes, gathering_bytes, state_bytes, training_step_bytes
from exporter.planning.compression import by_layer, changes_experts, expected_spec, only_narrows
from exporter.planning.plan import Plan
from exporter.planning.recipe import CompressChoice
from exporter.searching.ladder import TRIAL_BLOCKS, ladder_for
from exporter.searching.structures import structures_for, whole
from exporter.writing.gguf.layout import plan_tensors as gguf_tensors
from exporter.writing.onnx.layout import plan_tensors as onnx_tensors

__all__ = ["search_lines"]

_BESIDE_WEIGHTS = 4 << 20  # header or graph, twice


def search_lines(plan: Plan) -> dict[str, int]:
    """The bytes of a search by kind; none where there is no search.

    The line of the structure is the most that it, and its making or measuring, needs beside a file's layer: what
    comes before a file is measured needs less by that.
    """
    if plan.search is None:
        return {}
    original = whole(plan.teacher_spec)
    smaller = [choice for choice in structures_for(plan.search, plan.teacher_spec) if choice != original]
    tried = [_as_tried(plan, choice) for choice in _largest(smaller, plan)]
    measured = max(_measured_bytes(plan, artifact) for artifact in plan.predictions)
    return {
        "hidden states": state_bytes(plan, 4 * plan.recipe.text.selection_blocks),
        "sensitivities": sensitivity_bytes(plan.teacher_spec) if tried else 0,  # the structure's
        "a layer of a file that the search measures": measured,
        "a smaller structure that the search tries": max((_tried_bytes(each, measured) for each in tried), default=0),
    }


def _measured_bytes(plan: Plan, artifact: str) -> int:
    """The bytes of what belongs to no layer, and twice those of the largest layer; at most the whole file's.

    They are those of the recipe's types: the search may give a layer more bits, and others fewer.
    """
    spec, choice, file = plan.student_spec, plan.recipe.file(artifact), plan.predictions[artifact].file
    by_layer: Counter[int | None] = Counter()
    if artifact == "gguf":
        for tensor in gguf_tensors(spec, choice.mix, choice.tensors):
            by_layer[tensor.layer] += tensor.n_bytes
    else:
        for weight in onnx_tensors(spec, choice.mix, choice.tensors).weights:
            by_layer[weight.layer] += sum(tensor.n_bytes for tensor in weight.tensors)
    outside = by_layer.pop(None)
    return min(file, outside + 2 * max(by_layer.values()) + _BESIDE_WEIGHTS)


def _containers(choice: CompressChoice, plan: Plan) -> list[str]:
    """The formats of the run that can hold the structure; the search does not try one that none can."""
    spec = expected_spec(choice, plan.teacher_spec)
    return [name for name in plan.recipe.artifacts if refusal(spec, Container(name)) is None]


def _largest(structures: Sequence[CompressChoice], plan: Plan) -> Iterator[CompressChoice]:
    """Yields the structures that may need most: by the bytes of changed experts, and by the parameters of experts."""
    teacher, itemsize = plan.teacher_spec, plan.open_source().storage_type.itemsize
    changed = [choice for choice in structures if changes_experts(choice)]
    unchanged = [choice for choice in structures if choice not in changed]
    orders = (
        sorted(changed, key=lambda choice: _bytes_of_changed(choice, teacher, itemsize), reverse=True),
        *(
            sorted(alike, key=lambda choice: _relative_size(choice, teacher), reverse=True)
            for alike in (changed, unchanged)
        ),
    )
    for largest_first in orders:
        yield from islice((choice for choice in largest_first if _containers(choice, plan)), 1)


def _relative_size(choice: CompressChoice, teacher: ModelSpec) -> float:
    """The experts' parameters in relation to the original's, about; a dense student is smaller than all others."""
    return _n_experts(choice, teacher) * fmean(by_layer(choice.width, 1, teacher.expert_width))


def _bytes_of_changed(choice: CompressChoice, teacher: ModelSpec, itemsize: int) -> float:
    """The bytes that changed experts take in overlays, about; in relation to those of other structures."""
    size, n_kept = teacher.expert_size, fmean(by_layer(choice.width, 1, teacher.expert_width))
    if only_narrows(choice):
        return _n_experts(choice, teacher) * narrowed_bytes(size, teacher.expert_width, round(n_kept), itemsize)
    values_of_neuron = max(layer.expert_parameters for layer in teacher.layers) / teacher.expert_width
    return _n_experts(choice, teacher) * n_kept * values_of_neuron * itemsize


def _n_experts(choice: CompressChoice, teacher: ModelSpec) -> float:
    """The number of all experts in relation to that of other structures."""
    if choice.apart and choice.bases is not None:
        return choice.n_bases  # those that stay as they are lie in no overlay
    n_layers = teacher.n_layers - choice.drop_blocks - choice.drop_moe_layers
    return n_layers * fmean(by_layer(choice.experts, 1, teacher.n_experts))


def _as_tried(plan: Plan, choice: CompressChoice) -> Plan:
    """The plan of a run with this structure and the rungs that a search tries on it, which train no file."""
    ladder, _ = ladder_for(choice, plan)
    rungs = tuple(rung.model_copy(update={"blocks": min(rung.blocks, TRIAL_BLOCKS)}) for rung in ladder.rungs)
    recover = ladder.model_copy(update={"rungs": rungs})
    untyped, held = {"mix": "F32", "tensors": {}}, _containers(choice, plan)
    files = {
        name: plan.recipe.file(name).model_copy(update=untyped) if name in held else None
        for name in plan.recipe.artifacts
    }
    return replace(plan, recipe=plan.recipe.model_copy(update={"compress": choice, "recover": recover, **files}))


def _tried_bytes(plan: Plan, measured: int) -> int:
    """The bytes of a structure, and of its making, or of its measuring beside these bytes of a file."""
    statistics = statistics_bytes(plan.student_spec) if changes_experts(plan.recipe.compress) else 0
    kept = changed_expert_bytes(plan) + statistics + taught_bytes(plan)
    before_the_file = max(compressing_bytes(plan), training_step_bytes(plan, "recover"), gathering_bytes(plan))
    beside_the_file = 0
    if plan.keeps_layer_inputs:  # what enters the layer whose codes are chosen
        n_blocks = n_kept_blocks(plan.recipe.text.calibration_blocks, BLOCK_LENGTH)
        beside_the_file = state_bytes(plan, n_blocks * value_bytes(plan.recipe.arithmetic))
    return kept + max(before_the_file - measured, beside_the_file)
