"""The products of bases with tokens, and how experts read them, in a layer whose experts stand on shared bases.

Small bases are joined: every token is multiplied by all of them at once. A large base multiplies only the tokens that
chose any of its experts.

Letters: C chosen experts of one token, G groups of experts with a base in common, P matrices that read the input, U
uses: pairs of a group and a token that chose any of its experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from compressors.model.description.feed_forward import Routed
from compressors.model.description.shared_bases import SharedBases
from exporter.writing.onnx.builder import GraphBuilder

__all__ = ["Group", "GroupUses", "JoinedUses", "SeparateUses", "Uses", "add_zeros", "cut_by_group", "membership_of"]


@dataclass(frozen=True)
class Group:
    """Experts with a base in common.

    Attributes:
        base: its index in the layer, or ``SharedBases.ZERO``.
        members: their places among the layer's experts that stand on bases.
    """

    base: int
    members: tuple[int, ...]


class GroupUses(NamedTuple):
    """The products of one group's base."""

    products: str  # with gate and up, [uses, P F]
    places: str | None  # of the tokens that use the base, [uses, 1]; None: all do


@dataclass(frozen=True)
class Uses(ABC):
    """The products of all groups' bases with gate and up, and the form in which neurons are handed to down.

    Methods add nodes, whose names begin with ``name``.

    Attributes:
        graph: takes the nodes.
        routed: the experts.
        groups: those that stand on bases, by base.
    """

    graph: GraphBuilder
    routed: Routed
    groups: Sequence[Group]

    @property
    @abstractmethod
    def n_sums(self) -> int:
        """The number of values that hold the sums of neurons."""

    @abstractmethod
    def of_experts(self, groups: str | None, name: str) -> str | None:
        """For one token: the products of each chosen expert's base, [C, P, 1, F], or of the only base, [1, P, 1, F].

        ``groups`` names the chosen experts' groups, [C, 1] (:meth:`groups_of`). The result is None if no expert has a
        base.
        """

    @abstractmethod
    def sums_of_experts(self, neurons: str, groups: str | None, name: str) -> Sequence[str]:
        """For one token: the sums of neurons, which are [C, 1, 1, F], by the chosen experts' groups."""

    @abstractmethod
    def of_groups(self, states: str, name: str) -> Sequence[GroupUses]:
        """The products by group."""

    @abstractmethod
    def sums_of_groups(self, neurons: Sequence[str], name: str) -> Sequence[str]:
        """The sums of neurons from those of each group, [uses, F]."""

    def groups_of(self, experts: str, name: str) -> str | None:
        """The number of each chosen expert's group: [C, 1]; None where products and sums do not ask for it."""
        number = np.empty((sum(len(group.members) for group in self.groups), 1))
        for place, group in enumerate(self.groups):
            number[list(group.members)] = place
        return self.graph.node("Gather", [self.graph.constant("bases.group", number), experts], f"{name}.groups")

    def _apart(self, products: str, name: str) -> str:
        """The products of each group: [groups, P, 1, F]."""
        shape = [-1, len(self.routed.input_roles), 1, self.routed.width]
        return self._reshaped(products, shape, f"{name}.of_bases.apart")

    def _summed(self, neurons: str, groups: str, name: str) -> str:
        """The sum of neurons in each group: [G, 1, 1, F]."""
        zeros = self.graph.constant(
            "bases.no_neurons", np.zeros((len(self.groups), 1, 1, self.routed.width)), np.float32
        )
        return self.graph.node("ScatterND", [zeros, groups, neurons], f"{name}.sums", reduction="add")

    def _reshaped(self, values: str, shape: Sequence[int], output: str) -> str:
        return self.graph.node("Reshape", [values, self.graph.constant("bases.shape", shape)], output)


@dataclass(frozen=True)
class JoinedUses(Uses):
    """Every token has products with all bases.

    Attributes:
        products: with all tokens, those of all bases side by side, [T, bases P F]; None: there are no bases.
    """

    products: str | None

    @property
    def _with_base(self) -> list[Group]:
        return [group for group in self.groups if group.base != SharedBases.ZERO]

    @property
    def n_sums(self) -> int:
        """One, side by side for all bases: [T, bases F]; none without bases."""
        return min(1, len(self._with_base))

    def groups_of(self, experts: str, name: str) -> str | None:
        """See :class:`Uses`."""
        return None if len(self.groups) == 1 else super().groups_of(experts, name)

    def of_experts(self, groups: str | None, name: str) -> str | None:
        """See :class:`Uses`."""
        if self.products is None:
            return None
        apart = self._apart(self.products, name)
        if groups is None:
            return apart
        if len(self._with_base) < len(self.groups):
            shape = (1, len(self.routed.input_roles), 1, self.routed.width)
            zeros = self.graph.constant("bases.no_products", np.zeros(shape), np.float32)
            apart = self.graph.node("Concat", [apart, zeros], f"{name}.of_groups", axis=0)
        return self.graph.node("GatherND", [apart, groups], f"{name}.of_base")

    def sums_of_experts(self, neurons: str, groups: str | None, name: str) -> Sequence[str]:
        """See :class:`Uses`."""
        if self.products is None:
            return []
        if groups is None:
            axes = self.graph.constant("bases.axes_of_experts", [0, 1])
            return [self.graph.node("ReduceSum", [neurons, axes], f"{name}.sum_of_all", keepdims=0)]
        n_values = len(self._with_base) * self.routed.width
        side_by_side = self._reshaped(self._summed(neurons, groups, name), [1, -1], f"{name}.side_by_side")
        if len(self._with_base) == len(self.groups):
            return [side_by_side]
        start, end, axis = (self.graph.constant("bases.values", [number]) for number in (0, n_values, 1))
        return [self.graph.node("Slice", [side_by_side, start, end, axis], f"{name}.with_base")]

    def of_groups(self, states: str, name: str) -> Sequence[GroupUses]:
        """See :class:`Uses`."""
        products = []
        if self.products is not None:
            products = [self.products]
            if len(self._with_base) > 1:
                products = [f"{name}.of_base.{number}" for number in range(len(self._with_base))]
                self.graph.node("Split", [self.products], products, axis=1, num_outputs=len(products))
        if len(products) < len(self.groups):
            products.append(add_zeros(self.graph, states, self.routed.input_rows, f"{name}.nothing"))
        return [GroupUses(of_group, None) for of_group in products]

    def sums_of_groups(self, neurons: Sequence[str], name: str) -> Sequence[str]:
        """See :class:`Uses`."""
        with_base = neurons[: len(self._with_base)]
        if len(with_base) < 2:
            return with_base
        return [self.graph.node("Concat", with_base, f"{name}.side_by_side", axis=1)]


@dataclass(frozen=True)
class SeparateUses(Uses):
    """A base has products with the tokens that chose any of its experts.

    Attributes:
        products: by group, [uses, P F]; of experts without a base zeros.
        places: by group the tokens' places, [uses, 1].
        counts: the numbers of uses by group, [G].
    """

    products: Sequence[str]
    places: Sequence[str]
    counts: str

    @property
    def n_sums(self) -> int:
        """One for each group, [uses, F]."""
        return len(self.groups)

    def of_experts(self, groups: str | None, name: str) -> str | None:
        """See :class:`Uses`. Groups that the token uses have one row each."""
        graph = self.graph
        assert groups is not None, "rows of uses are asked for by group"
        used = graph.node("CumSum", [self.counts, graph.constant("zero", 0)], f"{name}.used")
        places = graph.node("Sub", [used, graph.constant("one", 1)], f"{name}.places")
        rows = graph.node("Gather", [places, groups], f"{name}.rows", axis=0)
        joined = self.products[0]
        if len(self.products) > 1:
            joined = graph.node("Concat", self.products, f"{name}.of_bases", axis=0)
        return graph.node("GatherND", [self._apart(joined, name), rows], f"{name}.of_base")

    def sums_of_experts(self, neurons: str, groups: str | None, name: str) -> Sequence[str]:
        """See :class:`Uses`. A group that the token does not use has no row."""
        assert groups is not None, "rows of uses are asked for by group"
        sums = self._reshaped(self._summed(neurons, groups, name), [-1, self.routed.width], f"{name}.rows_of_sums")
        is_used = self.graph.node("Cast", [self.counts], f"{name}.is_used", to=onnx.TensorProto.BOOL)
        in_use = self.graph.node("Compress", [sums, is_used], f"{sums}.in_use", axis=0)
        return cut_by_group(self.graph, in_use, self.groups, self.counts)

    def of_groups(self, states: str, name: str) -> Sequence[GroupUses]:
        """See :class:`Uses`."""
        return [GroupUses(*of_group) for of_group in zip(self.products, self.places, strict=True)]

    def sums_of_groups(self, neurons: Sequence[str], name: str) -> Sequence[str]:
        """See :class:`Uses`."""
        return neurons


def membership_of(groups: Sequence[Group]) -> npt.NDArray[np.float32]:
    """1 where an expert belongs to a group, else 0: float32 [experts on bases, G]."""
    member_EG = np.zeros((sum(len(group.members) for group in groups), len(groups)), np.float32)
    for number, group in enumerate(groups):
        member_EG[list(group.members), number] = 1
    return member_EG


def cut_by_group(graph: GraphBuilder, values: str, groups: Sequence[Group], counts: str) -> list[str]:
    """Cuts rows into those of each group, so many as ``counts`` says."""
    if len(groups) == 1:
        return [values]
    outputs = [f"{values}.{number}" for number in range(len(groups))]
    graph.node("Split", [values, counts], outputs, axis=0)
    return outputs


def add_zeros(graph: GraphBuilder, rows: str, size: int, output: str) -> str:
    """Adds zeros, so many for each row of a value: float32 [rows, size]."""
    row = graph.constant(f"bases.zeros_{size}", np.zeros((1, size)), np.float32)
    shape = graph.node("Shape", [rows], f"{output}.rows", start=0, end=1)
    times = graph.node("Concat", [shape, graph.constant("axis.1", [1])], f"{output}.times", axis=0)
    return graph.node("Expand", [row, times], output)
