"""The steps of compression that are possible for a model, and the containers that can hold each result.

Each step is tried in its smallest form on the model's description, and the capability table judges the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from compressors.model.description.spec import ModelSpec, MoeSize
from compressors.model.errors import UnsupportedError
from compressors.shrink.dense import check_dense
from compressors.shrink.registry import EXPERT_METHODS, expert_counts
from compressors.shrink.replace import FEWEST_ON_A_BASE, Replacement, spread
from compressors.shrink.slim import GGUF_WIDTH_MULTIPLE
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refusal
from exporter.planning.resulting_spec import condensed_size, layers_with_experts, resulting_spec

__all__ = ["STEPS", "Step", "refusals"]


@dataclass(frozen=True)
class Step:
    """A way of making a model smaller.

    Attributes:
        name: the result, for people.
        flags: the flags, or choices of a recipe, that ask for it.
        smallest: describes the result of its smallest form for a model; recipes are not needed, which take a tenth of a
            second to load.
    """

    name: str
    flags: str
    smallest: Callable[[ModelSpec], ModelSpec]


def refusals(step: Step, spec: ModelSpec) -> Mapping[Container, str | None]:
    """Says for each container why it cannot hold a model after a step; None if it can."""
    try:
        result = step.smallest(spec)
    except UnsupportedError as error:
        return dict.fromkeys(Container, str(error))
    return {container: refusal(result, container) for container in Container}


def _fewer_experts(spec: ModelSpec) -> ModelSpec:
    return resulting_spec(spec, _sizes(spec, n_experts=_next_count(spec)))


def _different_counts(spec: ModelSpec) -> ModelSpec:
    if len(layers_with_experts(spec)) < 2 or expert_counts("reap", spec).step != -1:
        raise UnsupportedError("all layers keep the same number of experts")
    return resulting_spec(spec, [MoeSize(_next_count(spec), spec.expert_width), *_sizes(spec)[1:]])


def _next_count(spec: ModelSpec) -> int:
    _, *fewer = expert_counts("reap", spec)
    if not fewer:
        raise UnsupportedError(f"all {spec.n_experts} experts of a layer are used for each token")
    return fewer[0]


def _narrower_experts(spec: ModelSpec) -> ModelSpec:
    width = (spec.expert_width - 1) // GGUF_WIDTH_MULTIPLE * GGUF_WIDTH_MULTIPLE
    if not width:
        raise UnsupportedError(f"experts of width {spec.expert_width} cannot be narrower than {GGUF_WIDTH_MULTIPLE}")
    return resulting_spec(spec, _sizes(spec, width=width))


def _fewer_layers(spec: ModelSpec) -> ModelSpec:
    _refuse_a_single_layer(spec)
    return resulting_spec(spec, _sizes(spec)[1:], drop_blocks=1)


def _layers_without_experts(spec: ModelSpec) -> ModelSpec:
    _refuse_a_single_layer(spec)
    return resulting_spec(spec, _sizes(spec)[1:], drop_moe_layers=1)


def _refuse_a_single_layer(spec: ModelSpec) -> None:
    if len(layers_with_experts(spec)) < 2:
        raise UnsupportedError("only one layer has experts")


def _factors(spec: ModelSpec) -> ModelSpec:
    return resulting_spec(spec, _sizes(spec))


def _replaced_experts(spec: ModelSpec) -> ModelSpec:
    sizes = _sizes(spec)
    numbers = Replacement(FEWEST_ON_A_BASE * len(sizes), len(sizes), rank=1)
    bases = spread(numbers, [size.n_experts for size in sizes])
    return resulting_spec(spec, [replace(size, bases=each) for size, each in zip(sizes, bases, strict=True)])


def _dense_student(spec: ModelSpec) -> ModelSpec:
    check_dense(spec)
    return resulting_spec(spec, [condensed_size(spec, spec.expert_width)] * len(layers_with_experts(spec)))


def _sizes(spec: ModelSpec, n_experts: int | None = None, width: int | None = None) -> list[MoeSize]:
    """The sizes of all layers with experts; None: as they are."""
    size = MoeSize(n_experts or spec.n_experts, width or spec.expert_width)
    return [size] * len(layers_with_experts(spec))


STEPS = (
    Step(
        "fewer or merged experts",
        f"--method {', '.join(EXPERT_METHODS)}",
        _fewer_experts,
    ),
    Step("a different number of experts in each layer", "allocation: global, or experts: [...]", _different_counts),
    Step("narrower experts", "--method slim", _narrower_experts),
    Step("fewer layers", "--method block-drop", _fewer_layers),
    Step("layers without experts", "--method layer-drop", _layers_without_experts),
    Step("experts as factors that are written out", "edit: svd, d2-moe or mobe", _factors),
    Step("experts on shared bases", "--method lightmoe", _replaced_experts),
    Step("a dense student", "--student dense", _dense_student),
)
"""All steps, in the order of docs/compression.md."""
