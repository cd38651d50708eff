"""The steps of compression that are possible for a model, and the containers that can hold each result.

Each step is tried in its smallest form on the model's description, and the capability table judges the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError
from compressors.shrink.dense import check_dense
from compressors.shrink.registry import EXPERT_METHODS, LIGHT_MOE, expert_counts
from compressors.shrink.replace import FEWEST_ON_A_BASE
from compressors.shrink.slim import GGUF_WIDTH_MULTIPLE
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refusal
from exporter.planning.compression import expected_spec, layers_with_experts
from exporter.planning.recipe import CompressChoice

__all__ = ["STEPS", "Step", "refusals"]


@dataclass(frozen=True)
class Step:
    """A way of making a model smaller.

    Attributes:
        name: the result, for people.
        flags: the flags, or choices of a recipe, that ask for it.
        smallest: gives its smallest form for a model.
    """

    name: str
    flags: str
    smallest: Callable[[ModelSpec], CompressChoice]


def refusals(step: Step, spec: ModelSpec) -> Mapping[Container, str | None]:
    """Says for each container why it cannot hold a model after a step; None if it can."""
    try:
        choice = step.smallest(spec)
    except UnsupportedError as error:
        return dict.fromkeys(Container, str(error))
    result = expected_spec(choice, spec)
    return {container: refusal(result, container) for container in Container}


def _fewer_experts(spec: ModelSpec) -> CompressChoice:
    return CompressChoice(experts=_next_count(spec), method="reap")


def _different_counts(spec: ModelSpec) -> CompressChoice:
    n_layers = len(layers_with_experts(spec))
    if n_layers < 2 or expert_counts("reap", spec).step != -1:
        raise UnsupportedError("all layers keep the same number of experts")
    return CompressChoice(experts=(_next_count(spec), *[spec.n_experts] * (n_layers - 1)), method="reap")


def _next_count(spec: ModelSpec) -> int:
    _, *fewer = expert_counts("reap", spec)
    if not fewer:
        raise UnsupportedError(f"all {spec.n_experts} experts of a layer are used for each token")
    return fewer[0]


def _narrower_experts(spec: ModelSpec) -> CompressChoice:
    width = (spec.expert_width - 1) // GGUF_WIDTH_MULTIPLE * GGUF_WIDTH_MULTIPLE
    if not width:
        raise UnsupportedError(f"experts of width {spec.expert_width} cannot be narrower than {GGUF_WIDTH_MULTIPLE}")
    return CompressChoice(experts=spec.n_experts, width=width)


def _fewer_layers(spec: ModelSpec) -> CompressChoice:
    return CompressChoice(experts=spec.n_experts, drop_blocks=_one_of_several_layers(spec))


def _layers_without_experts(spec: ModelSpec) -> CompressChoice:
    return CompressChoice(experts=spec.n_experts, drop_moe_layers=_one_of_several_layers(spec))


def _one_of_several_layers(spec: ModelSpec) -> int:
    if len(layers_with_experts(spec)) < 2:
        raise UnsupportedError("only one layer has experts")
    return 1


def _factors(spec: ModelSpec) -> CompressChoice:
    return CompressChoice(experts=spec.n_experts, edit="svd", edit_size=1)


def _replaced_experts(spec: ModelSpec) -> CompressChoice:
    n_layers, n_replaced = len(layers_with_experts(spec)), FEWEST_ON_A_BASE
    return CompressChoice(
        experts=spec.n_experts,
        edit=LIGHT_MOE.name,
        edit_size=1,
        replaced=n_replaced * n_layers,
        bases=n_layers,
        apart=True,
    )


def _dense_student(spec: ModelSpec) -> CompressChoice:
    check_dense(spec)
    return CompressChoice(experts=spec.n_experts, student="dense")


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
