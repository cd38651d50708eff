"""Bytes of the parts of a run, and the memory that it needs, by arithmetic alone.

Bytes are upper bounds, apart from a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from compressors.calibration.sizes import statistics_bytes as bytes_of_layer
from compressors.calibration.splits import BLOCK_LENGTH
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import Kind
from compressors.model.running.memory import PROCESS_BYTES, positions_at_once, working_bytes
from compressors.model.sources.narrowed import narrowed_bytes
from compressors.recover.scopes import Scope
from compressors.recover.training_memory import training_bytes
from compressors.shrink.replace import adapter_values
from exporter.estimating.planned_types import planned_block_length
from exporter.planning.compression import changes_experts, only_narrows, shrinks
from exporter.planning.plan import Plan
from exporter.planning.recipe import RungChoice
from exporter.planning.recovery import scope_of
from exporter.writing.feedback_memory import least_feedback_bytes
from validate.routing.router_inputs import ROUTER_CHUNKS

__all__ = [
    "changed_expert_bytes",
    "expert_bytes",
    "heldout_blocks",
    "memory_lines",
    "router_input_bytes",
    "sensitivity_bytes",
    "statistics_bytes",
    "student_bytes",
    "student_differs",
    "taught_bytes",
    "training_snapshot_bytes",
    "tunable_bytes",
]

_HEADERS = 1 << 16  # bytes of the headers of the sensitivities' files


def memory_lines(spec: ModelSpec, student: ModelSpec, itemsize: int) -> dict[str, int]:
    """The least memory that the stages need, by purpose; it does not depend on the number of layers.

    Args:
        spec: the source.
        student: the student; the one expert of a dense layer is wider than any of the source's.
        itemsize: bytes of a stored weight.
    """
    layers = 2 * itemsize * max(layer.parameters for layer in spec.layers)
    # the heads are read when the layers are gone: the student's, widened, and the original's, to compare with it
    heads = (4 + itemsize) * spec.vocab_size * spec.hidden_size
    lines = {
        # one computes while the next is read
        "two decoder layers" if layers >= heads else "the head of the student and of the original": max(layers, heads),
        "activations and an expert in float32": max(working_bytes(spec), working_bytes(student)),
        "logits": positions_at_once(spec.vocab_size) * spec.vocab_size * 4,
    }
    more = least_feedback_bytes(student) - sum(lines.values())
    if more > 0:  # where experts are few and wide
        lines["what enters an expert, while its codes are chosen"] = more
    return lines | {"the process itself": PROCESS_BYTES}


def sensitivity_bytes(spec: ModelSpec) -> int:
    """Float32 bytes of rows and columns of every matrix, two moments of the hidden size, four numbers of each token."""
    hidden, of_layers = spec.hidden_size, sum(_rows_and_columns(layer) for layer in spec.layers)
    return 4 * (of_layers + 2 * hidden * hidden + 2 * hidden + 4 * spec.vocab_size) + _HEADERS


def _rows_and_columns(layer: LayerSpec) -> int:
    """The numbers of rows and of columns of a layer's matrices, all added up."""
    matrices = [tensor for tensor in layer.tensors if tensor.kind is Kind.MATRIX]
    return sum(sum(layer.dimensions(tensor)) * (layer.n_experts if tensor.is_per_expert else 1) for tensor in matrices)


def heldout_blocks(plan: Plan) -> int:
    """The number of held-out blocks; a folder has as many texts as files, a file or a part set aside from it is one."""
    places = [plan.heldout] if plan.heldout is not None else [text.path for text in plan.calibration]
    n_files = sum(len(list(place.glob("*.txt"))) if place.is_dir() else 1 for place in places)
    return n_files * plan.recipe.text.heldout_chunks_per_file


def router_input_bytes(plan: Plan) -> int:
    """Bytes of the inputs of the student's routers on a few held-out blocks, in float32, and of their choices."""
    written = plan.student_spec.written
    n_tokens = min(ROUTER_CHUNKS, heldout_blocks(plan)) * BLOCK_LENGTH
    of_token = (written.hidden_size * 4 + layer.top_k * 8 + 4 for layer in written.layers if layer.routed is not None)
    return n_tokens * sum(of_token)


def student_bytes(plan: Plan) -> int:
    """Bytes of the student's checkpoint: the source's dtype, but routers, if it has any, in float32."""
    shape, itemsize = plan.student_spec, plan.open_source().storage_type.itemsize
    return shape.parameters * itemsize + _router_values(shape.written) * (4 - itemsize)


def changed_expert_bytes(plan: Plan) -> int:
    """Bytes that lie in overlays of the experts that compression changes.

    They are all of the student's experts; or the neurons that stay, and what makes up for the others; or bases and
    adapters alone; or none.
    """
    if not changes_experts(plan.recipe.compress):
        return 0
    itemsize, layers = plan.open_source().storage_type.itemsize, plan.student_spec.layers
    if only_narrows(plan.recipe.compress):
        width, size = plan.teacher_spec.expert_width, plan.teacher_spec.expert_size
        kept = [(layer.n_experts, layer.expert_width) for layer in layers if layer.n_experts]
        return sum(n_experts * narrowed_bytes(size, width, n_kept, itemsize) for n_experts, n_kept in kept)
    return expert_bytes(plan) - sum(_bytes_beside_bases(layer, itemsize) for layer in layers)


def _bytes_beside_bases(layer: LayerSpec, itemsize: int) -> int:
    """Bytes of a layer's experts that an overlay leaves out where some stand on bases; adapters are float32."""
    if layer.bases is None:
        return 0
    left_out = (layer.n_experts - layer.bases.n_bases) * layer.expert_parameters * itemsize
    return left_out - 4 * len(layer.bases.replaced) * adapter_values(layer, layer.bases.rank)


def expert_bytes(plan: Plan) -> int:
    """Bytes of all of the student's experts in the source's dtype."""
    shape, itemsize = plan.student_spec, plan.open_source().storage_type.itemsize
    return sum(layer.n_experts * layer.expert_parameters for layer in shape.layers) * itemsize


def training_snapshot_bytes(plan: Plan, trained: Sequence[RungChoice]) -> int:
    """Bytes of a snapshot of what these rungs train, one at a time: the tensors and their two moments, in float32."""
    spec = plan.student_spec
    # among the files that are trained separately, the one with the shortest blocks has the most factors
    lengths = [planned_block_length(plan.recipe, artifact, spec) for artifact in plan.recipe.artifacts]
    return 3 * max(training_bytes(scope_of(rung), spec, length).weights for rung in trained for length in lengths)


def taught_bytes(plan: Plan) -> int:
    """Bytes of what all rungs before quantizing teach: routers and adapters in float32, experts in storage dtype."""
    return sum(_rung_bytes(plan, rung) for rung in plan.recipe.recover.rungs)


def _rung_bytes(plan: Plan, rung: RungChoice) -> int:
    if rung.scope in ("adapters", "replaced"):
        return training_bytes(scope_of(rung), plan.student_spec).weights
    routers = 4 * _router_values(plan.student_spec)
    return routers if rung.scope in ("router", "norms") else routers + expert_bytes(plan)


def tunable_bytes(plan: Plan, artifact: str) -> int:
    """Bytes of the values of a file that are tuned, or of their replacements: two scales a block, in float32."""
    spec = plan.student_spec
    if plan.recipe.recover.after_quantizing is None:
        return 0
    block_length = planned_block_length(plan.recipe, artifact, spec)
    return 2 * training_bytes(Scope.block_scales(), spec, block_length).weights


def _router_values(spec: ModelSpec) -> int:
    routers = [(layer, tensor) for layer in spec.layers for tensor in layer.tensors if tensor.kind is Kind.ROUTER]
    return sum(layer.n_values(tensor) for layer, tensor in routers)


def student_differs(plan: Plan) -> bool:
    """True if the inputs of the student's layers differ from those of the original's."""
    return shrinks(plan.recipe.compress, plan.teacher_spec) or bool(plan.recipe.recover.rungs)


def statistics_bytes(spec: ModelSpec) -> int:
    """Bytes of the statistics of all layers, each as large as the largest."""
    return len(spec.blocks) * max(bytes_of_layer(layer) for layer in spec.blocks)
