"""All methods by which a model can be made smaller: one line for each.

Planning, recipes, command line and benchmarks ask here. A new criterion is a line of
:data:`compressors.shrink.criteria.CRITERIA`, and needs none here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING

from compressors.model.description.routing import Routing
from compressors.model.description.spec import ModelSpec
from compressors.shrink.criteria import CRITERIA, REMOVAL_ERROR, Criterion
from compressors.shrink.needs import Needs

if TYPE_CHECKING:
    from compressors.shrink.moe_block import Method

__all__ = [
    "APART",
    "BLOCK_DROP",
    "EDITS",
    "EXPERT_METHODS",
    "KEEPS_EXPERTS",
    "LAYER_DROP",
    "LIGHT_MOE",
    "METHODS",
    "SLIM",
    "Changes",
    "RegisteredMethod",
    "expert_counts",
    "fewest_experts",
    "made",
]


class Changes(StrEnum):
    """The change that a method makes."""

    NUMBER = "the number of experts"  # those that stay are as they were
    MERGED = "the number of experts, and their weights"
    WIDTH = "the width of experts"
    VALUES = "the weights of experts"
    SHARED = "which experts stand on shared bases"
    EXPERTS_OF_LAYERS = "which layers have experts"
    LAYERS = "the number of layers"


@dataclass(frozen=True)
class RegisteredMethod:
    """A method under its name in recipes and on the command line.

    Attributes:
        name: its name.
        changes: the change that it makes.
        kind: the class of the method for one layer and its module in this package, which is imported when the method
            is made; None: the method changes whole layers.
        needs: the evidence that it needs in each layer.
        is_sequential: the method is defined on layers whose predecessors are already compressed.
        largest_group: the most experts that it merges into one; None: any number.
        score: gives the scores of a layer's experts that are known in advance; None: there are none.
        in_gguf: a GGUF file can hold its result, as it is at its smallest. ONNX graphs hold all.
    """

    name: str
    changes: Changes
    kind: str | None
    needs: Needs = Needs.STATISTICS
    is_sequential: bool = False
    largest_group: int | None = None
    score: Criterion | None = None
    in_gguf: bool = True

    @property
    def changes_weights(self) -> bool:
        """True if experts get weights of their own."""
        return self.changes in (Changes.MERGED, Changes.WIDTH, Changes.VALUES, Changes.SHARED)


_PRUNE = "prune.Prune"
SLIM = RegisteredMethod("slim", Changes.WIDTH, "slim.width.SlimWidth", Needs.INPUTS)
LIGHT_MOE = RegisteredMethod("lightmoe", Changes.SHARED, "replace.light_moe.LightMoE", Needs.INPUTS, in_gguf=False)
BLOCK_DROP = RegisteredMethod("block-drop", Changes.LAYERS, None)
LAYER_DROP = RegisteredMethod("layer-drop", Changes.EXPERTS_OF_LAYERS, None, in_gguf=False)

_ALL = (
    *(RegisteredMethod(name, Changes.NUMBER, _PRUNE, score=score) for name, score in CRITERIA.items()),
    RegisteredMethod(REMOVAL_ERROR, Changes.NUMBER, _PRUNE, Needs.INPUTS),
    RegisteredMethod("m-smoe", Changes.MERGED, "merge.m_smoe.MSMoE", Needs.WEIGHTS),
    RegisteredMethod("hc-smoe", Changes.MERGED, "merge.hc_smoe.HCSMoE", Needs.INPUTS),
    RegisteredMethod("ream", Changes.MERGED, "merge.ream.REAM", Needs.INPUTS, is_sequential=True, largest_group=16),
    RegisteredMethod("svd", Changes.VALUES, "decompose.svd.ActivationSvd", Needs.INPUTS),
    RegisteredMethod("d2-moe", Changes.VALUES, "decompose.d2_moe.D2Moe", Needs.INPUTS),
    RegisteredMethod("mobe", Changes.VALUES, "decompose.mobe.Mobe", Needs.WEIGHTS),
    LIGHT_MOE,
    SLIM,
    BLOCK_DROP,
    LAYER_DROP,
)

METHODS: Mapping[str, RegisteredMethod] = {method.name: method for method in _ALL}
"""The methods by name."""

EXPERT_METHODS = tuple(method.name for method in _ALL if method.changes in (Changes.NUMBER, Changes.MERGED))
"""The names of the methods by which experts become fewer."""

EDITS = tuple(method.name for method in _ALL if method.changes in (Changes.VALUES, Changes.SHARED))
"""The names of the methods that rewrite experts."""

APART = ("svd", "d2-moe", LIGHT_MOE.name)
"""The names of the methods whose experts are a base, or nothing, plus a low-rank part, which ONNX files may keep apart.
MoBE's bases pass through a function before they are mixed, so its experts are always multiplied out."""

KEEPS_EXPERTS = (SLIM.name, LIGHT_MOE.name, BLOCK_DROP.name, LAYER_DROP.name)
"""The names of the methods of the command line that keep all experts, or none, in each layer."""


def made(name: str, target: int) -> Method:
    """Makes the method of this name for one layer; the target is the number of experts left, the width, or a size."""
    kind = METHODS[name].kind
    assert kind is not None, f"{name} is about whole layers"
    module, _, class_name = f"{__package__}.{kind}".rpartition(".")
    make = getattr(import_module(module), class_name)
    method: Method = make(name, target) if kind == _PRUNE else make(target)
    return method


def fewest_experts(method: str, teacher: ModelSpec) -> int:
    """The fewest experts that each layer can keep: as many as a token uses, and enough for the method's groups.

    Args:
        method: its name; one that is not registered, such as ``none``, has no limit of its own.
        teacher: the model.
    """
    registered = METHODS.get(method)
    largest = None if registered is None else registered.largest_group
    of_method = 1 if largest is None else -(-teacher.n_experts // largest)
    of_routers = [_fewest_of(layer.routed.routing, layer.top_k) for layer in teacher.layers if layer.routed]
    n_groups = _n_groups(teacher)
    return -(-max(of_method, *of_routers) // n_groups) * n_groups


def expert_counts(method: str, teacher: ModelSpec) -> range:
    """The numbers of experts that a layer can keep, from all of them down."""
    return range(teacher.n_experts, fewest_experts(method, teacher) - 1, -_n_groups(teacher))


def _n_groups(teacher: ModelSpec) -> int:
    """The number of groups of experts that must stay equal in size."""
    return max(layer.routed.routing.n_groups for layer in teacher.layers if layer.routed)


def _fewest_of(routing: Routing, top_k: int) -> int:
    """The fewest experts from which a router can choose ``top_k`` out of its best groups."""
    of_group = max(-(-top_k // routing.n_chosen_groups), routing.group_score.n_best)
    return of_group * routing.n_groups
