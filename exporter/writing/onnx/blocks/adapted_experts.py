"""The share of experts with adapters in a layer whose experts stand on bases.

For one token all chosen experts go together, in products of many matrices. For several tokens a loop goes over the
chosen experts of each group, so that the adapter of each is read once, and the memory is that of the tokens' rows. A
time of the loop costs 10 microseconds beside its products.

Letters: C chosen experts of one token, N tokens of one expert, P matrices that read the input, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from compressors.model.description.feed_forward import Routed
from compressors.model.description.roles import Role
from compressors.model.sources.onnx_weights import Form
from exporter.writing.onnx.builder import MICROSOFT, GraphBuilder
from exporter.writing.onnx.glu import add_glu
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["Group", "Uses", "add_adapted_experts", "add_zeros", "cut_by_group", "membership_of"]


@dataclass(frozen=True)
class Group:
    """Experts with a base in common.

    Attributes:
        base: its index in the layer, or ``SharedBases.ZERO``.
        members: their places among the layer's experts that stand on bases.
    """

    base: int
    members: tuple[int, ...]


class Uses(NamedTuple):
    """The products of bases with the tokens that they are used for.

    Attributes:
        products: by group: names of the products with gate and up, [uses, P F].
        rows: by group: names of the tokens' places, [uses, 1]; None: every token uses every base.
        counts: the name of the numbers of uses by group, [G], where not all tokens use all bases.
    """

    products: Sequence[str]
    rows: Sequence[str] | None = None
    counts: str | None = None


def add_adapted_experts(
    layer: LayerNodes,
    routed: Routed,
    groups: Sequence[Group],
    tokens: tuple[str, str, str],
    uses: Uses,
) -> Sequence[str]:
    """Adds the experts' products but those of the bases.

    Args:
        layer: takes the nodes.
        routed: the experts.
        groups: those that stand on bases, by base.
        tokens: names of the input [T, D], of the weights [T, experts on bases], and of a sum of outputs [T, D].
        uses: the products of bases.

    Returns:
        By group the name of the sum of neurons by weight, [uses, F], and the name of the sum of outputs with those of
        all adapters added.
    """
    experts = _Experts(layer, routed, groups, f"{layer.prefix}adapted")
    graph = layer.graph
    for role in (routed.input_roles[0], Role.EXPERT_DOWN):
        layer.weights.use_factors(role, layer.index)
    is_one = graph.once("adapted.is_one", lambda name: _is_one_token(graph, tokens[0], name))
    return graph.choices(
        is_one,
        [*(f"{layer.prefix}adapted.hidden.{number}" for number in range(len(groups))), f"{layer.prefix}adapted.sum"],
        then=lambda: experts.of_one_token(*tokens, uses),
        otherwise=lambda: experts.of_all_tokens(*tokens, uses),
    )


def _is_one_token(graph: GraphBuilder, states: str, name: str) -> str:
    n_tokens = graph.node("Shape", [states], f"{name}.number", start=0, end=1)
    return graph.node("Equal", [n_tokens, graph.constant("ones", [1])], name)


class _Group(NamedTuple):
    """The values that a loop over a group's experts reads: names."""

    members: str  # the experts' places among those with adapters
    present: str  # the numbers of those in the group that any token chose
    weights: str  # of all tokens that use the base, [uses, members]
    states: str  # the input of all tokens, [T, D]
    of_base: str  # [uses, P F]
    places: str | None  # of the tokens that use the base, [uses, 1]; None: all do


class _Experts:
    def __init__(self, layer: LayerNodes, routed: Routed, groups: Sequence[Group], name: str) -> None:
        self._layer = layer
        self._graph = layer.graph
        self._routed = routed
        self._groups = groups
        self._name = name

    def of_one_token(self, states: str, weights: str, total: str, uses: Uses) -> Sequence[str]:
        """Adds the shares of all experts that the only token chose, at a time."""
        graph, name = self._graph, f"{self._name}.one"
        found = graph.node("NonZero", [weights], f"{name}.found")
        experts = graph.node("Gather", [found, graph.constant("one", 1)], f"{name}.experts", axis=0)
        of_base, adapted = self._products_of_bases(uses, experts, name), self._adapted_inputs(states, experts, name)
        products = self._parts(graph.node("Add", [of_base, adapted], f"{name}.products"), axis=1)
        hidden = self._hidden(products, name)
        row = graph.node("Gather", [weights, experts], f"{name}.row", axis=1)
        factors = self._reshaped(row, f"{name}.weights", [-1, 1, 1, 1])
        weighed = graph.node("Mul", [hidden, factors], f"{name}.weighed")
        outputs = self._adapted(weighed, Role.EXPERT_DOWN, experts, name)
        axes = graph.constant("axes.0_1_2", [0, 1, 2])
        summed = graph.node("ReduceSum", [outputs, axes], f"{name}.outputs", keepdims=0)
        total = graph.node("Add", [total, summed], f"{name}.sum")
        return [*self._by_group(weighed, experts, uses.counts, name), total]

    def _adapted_inputs(self, states: str, experts: str, name: str) -> str:
        """The token times the adapters of gate and up: [C, P, 1, F]. C may be 0, to which no product is broadcast."""
        graph = self._graph
        column = self._reshaped(states, f"{name}.column", [self._layer.spec.expert_size, 1])
        first, second = self._factors(self._routed.input_roles[0], experts, f"{name}.input")
        inner = graph.node("MatMul", [first, column], f"{name}.input.inner")
        return graph.node("FusedMatMul", [inner, second], f"{name}.input.adapted", domain=MICROSOFT, transA=1)

    def _products_of_bases(self, uses: Uses, experts: str, name: str) -> str:
        """The products of each chosen expert's base: [C, P, 1, F]. Groups that the token uses have one row each."""
        graph = self._graph
        number = np.empty(sum(len(group.members) for group in self._groups))
        for place, group in enumerate(self._groups):
            number[list(group.members)] = place
        rows = graph.node("Gather", [graph.constant("bases.group", number), experts], f"{name}.groups", axis=0)
        if uses.counts is not None:
            used = graph.node("CumSum", [uses.counts, graph.constant("zero", 0)], f"{name}.used")
            places = graph.node("Sub", [used, graph.constant("one", 1)], f"{name}.places")
            rows = graph.node("Gather", [places, rows], f"{name}.rows", axis=0)
        joined = uses.products[0]
        if len(uses.products) > 1:
            joined = graph.node("Concat", uses.products, f"{name}.of_bases", axis=0)
        shape = [-1, len(self._routed.input_roles), 1, self._routed.width]
        apart = self._reshaped(joined, f"{name}.of_bases.apart", shape)
        return graph.node("Gather", [apart, rows], f"{name}.of_base", axis=0)

    def _by_group(self, weighed: str, experts: str, counts: str | None, name: str) -> list[str]:
        """The sum of neurons in each group: [1, F], or [0, F] for one that the token does not use."""
        graph = self._graph
        membership = graph.constant("bases.membership", membership_of(self._groups), np.float32)
        members = graph.node("Gather", [membership, experts], f"{name}.members", axis=0)
        neurons = self._reshaped(weighed, f"{name}.neurons", [-1, self._routed.width])
        sums = graph.node("FusedMatMul", [members, neurons], f"{name}.sums", domain=MICROSOFT, transA=1)
        if counts is None:
            return cut_by_group(graph, sums, self._groups, None)
        is_used = graph.node("Cast", [counts], f"{name}.is_used", to=onnx.TensorProto.BOOL)
        in_use = graph.node("Compress", [sums, is_used], f"{sums}.in_use", axis=0)
        return cut_by_group(graph, in_use, self._groups, counts)

    def of_all_tokens(self, states: str, weights: str, total: str, uses: Uses) -> Sequence[str]:
        """Adds the shares of each group's chosen experts, one expert after the other."""
        graph, sums = self._graph, []
        for number, (group, of_base) in enumerate(zip(self._groups, uses.products, strict=True)):
            name = f"{self._name}.all.{number}"
            members = graph.constant("bases.members", group.members)
            of_members = graph.node("Gather", [weights, members], f"{name}.of_members", axis=1)
            places, of_users = None if uses.rows is None else uses.rows[number], of_members
            if places is not None:
                tokens = self._reshaped(places, f"{name}.tokens", [-1])
                of_users = graph.node("Gather", [of_members, tokens], f"{name}.of_users", axis=0)
            present = self._present(of_members, name)
            values = _Group(members, present, of_users, states, of_base, places)
            neurons, total = self._of_group(values, total, name)
            sums.append(neurons)
        return [*sums, total]

    def _present(self, weights: str, name: str) -> str:
        """The numbers of the experts that any token chose."""
        graph = self._graph
        largest = graph.node("ReduceMax", [weights, graph.constant("axis.0", [0])], f"{name}.largest", keepdims=0)
        return self._reshaped(graph.node("NonZero", [largest], f"{name}.chosen"), f"{name}.present", [-1])

    def _of_group(self, group: _Group, total: str, name: str) -> Sequence[str]:
        """Goes through these experts: the sum of their neurons, [uses, F], and that of outputs, [T, D]."""
        graph = self._graph
        trips = graph.node("Shape", [group.present], f"{name}.trips")
        zeros = add_zeros(graph, group.weights, self._routed.width, f"{name}.zeros")

        def one_expert(number: str, sums: Sequence[str]) -> Sequence[str]:
            return self._one_expert(group, number, sums, name)

        return graph.loop(trips, [zeros, total], [f"{name}.neurons", f"{name}.sum"], one_expert)

    def _one_expert(self, group: _Group, number: str, sums: Sequence[str], name: str) -> Sequence[str]:
        """Adds an expert's neurons by weight to the first sum, and its adapter's products with them to the second."""
        graph = self._graph
        member = graph.node("Gather", [group.present, number], f"{name}.member", axis=0)
        expert = graph.node("Gather", [group.members, member], f"{name}.expert", axis=0)
        own = graph.node("Gather", [group.weights, member], f"{name}.own", axis=1)
        found = graph.node("NonZero", [own], f"{name}.found")
        uses = graph.node("Transpose", [found], f"{name}.uses", perm=[1, 0])
        tokens = uses
        if group.places is not None:
            rows = self._reshaped(found, f"{name}.rows", [-1])
            tokens = graph.node("Gather", [group.places, rows], f"{name}.its_tokens", axis=0)
        inputs = graph.node("GatherND", [group.states, tokens], f"{name}.inputs")
        of_base = graph.node("GatherND", [group.of_base, uses], f"{name}.of_base")
        adapted = self._adapted(inputs, self._routed.input_roles[0], expert, name)
        parts = zip(self._parts(of_base, axis=1), self._parts(adapted, axis=0), strict=True)
        hidden = self._hidden([graph.node("Add", pair, f"{pair[1]}.product") for pair in parts], name)
        factors = graph.node("Gather", [own, uses], f"{name}.factors", axis=0)
        weighed = graph.node("Mul", [hidden, factors], f"{name}.weighed")
        outputs = self._adapted(weighed, Role.EXPERT_DOWN, expert, name)
        added = (
            (sums[0], uses, self._reshaped(weighed, f"{name}.neurons_of_it", [-1, self._routed.width])),
            (sums[1], tokens, self._reshaped(outputs, f"{name}.outputs", [-1, self._layer.spec.expert_size])),
        )
        return [graph.node("ScatterND", each, f"{each[0]}.and_one", reduction="add") for each in added]

    def _adapted(self, values: str, role: Role, experts: str, name: str) -> str:
        """The values times the adapters of gate and up, or of down: [C, P, 1, outputs] or [P, N, outputs]."""
        graph, name = self._graph, f"{name}.{'down' if role is Role.EXPERT_DOWN else 'input'}"
        first, second = self._factors(role, experts, name)
        inner = graph.node("FusedMatMul", [values, first], f"{name}.inner", domain=MICROSOFT, transB=1)
        return graph.node("MatMul", [inner, second], f"{name}.adapted")

    def _factors(self, role: Role, experts: str, name: str) -> tuple[str, str]:
        first, second = (
            self._layer.weights.factor(role, self._layer.index, form, experts, f"{name}.{form.value}")
            for form in (Form.INPUTS, Form.OUTPUTS)
        )
        return first, second

    def _parts(self, products: str, axis: int) -> list[str]:
        """The products of gate and of up, or those of up alone."""
        if not self._routed.glu.is_gated:
            return [products]
        outputs = [f"{products}.gate", f"{products}.up"]
        self._graph.node("Split", [products], outputs, axis=axis, num_outputs=2)
        return outputs

    def _hidden(self, products: Sequence[str], name: str) -> str:
        *gate, up = products
        return add_glu(self._graph, self._routed.glu, gate[0] if gate else None, up, name)

    def _reshaped(self, values: str, output: str, shape: Sequence[int]) -> str:
        name = "_".join(map(str, shape)).replace("-1", "all")
        return self._graph.node("Reshape", [values, self._graph.constant(f"bases.shape_{name}", shape)], output)


def membership_of(groups: Sequence[Group]) -> npt.NDArray[np.float32]:
    """1 where an expert belongs to a group, else 0: float32 [experts on bases, G]."""
    member_EG = np.zeros((sum(len(group.members) for group in groups), len(groups)), np.float32)
    for number, group in enumerate(groups):
        member_EG[list(group.members), number] = 1
    return member_EG


def cut_by_group(graph: GraphBuilder, values: str, groups: Sequence[Group], counts: str | None) -> list[str]:
    """Cuts rows into those of each group, so many as ``counts`` says; None: one of each."""
    if len(groups) == 1:
        return [values]
    outputs = [f"{values}.{number}" for number in range(len(groups))]
    if counts is None:
        graph.node("Split", [values], outputs, axis=0, num_outputs=len(groups))
    else:
        graph.node("Split", [values, counts], outputs, axis=0)
    return outputs


def add_zeros(graph: GraphBuilder, rows: str, size: int, output: str) -> str:
    """Adds zeros, so many for each row of a value: float32 [rows, size]."""
    row = graph.constant(f"bases.zeros_{size}", np.zeros((1, size)), np.float32)
    shape = graph.node("Shape", [rows], f"{output}.rows", start=0, end=1)
    times = graph.node("Concat", [shape, graph.constant("axis.1", [1])], f"{output}.times", axis=0)
    return graph.node("Expand", [row, times], output)
