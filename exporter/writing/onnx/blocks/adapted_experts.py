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


class _Experts:
    def __init__(self, layer: LayerNodes, routed: Routed, groups: Sequence[Group], name: str) -> None:
        assert layer.spec.bases is not None, f"layer {layer.index} has no bases"
        self._layer = layer
        self._graph = layer.graph
        self._routed = routed
        self._groups = groups
        self._name = name
        self._rank = layer.spec.bases.rank
        self._size = layer.spec.expert_size

    def of_one_token(self, states: str, weights: str, total: str, uses: Uses) -> Sequence[str]:
        """Adds the shares of all experts that the only token chose, at a time."""
        graph, name = self._graph, f"{self._name}.one"
        found = graph.node("NonZero", [weights], f"{name}.found")
        experts = graph.node("Gather", [found, graph.constant("one", 1)], f"{name}.experts", axis=0)
        of_base = self._products_of_bases(uses, experts, name)
        adapted = self._adapted_inputs(states, experts, name)
        hidden = self._hidden(graph.node("Add", [of_base, adapted], f"{name}.products"), name)
        row = graph.node("Gather", [weights, experts], f"{name}.row", axis=1)
        column = self._reshaped(row, f"{name}.weights", [-1, 1])
        weighed = graph.node("Mul", [hidden, column], f"{name}.weighed")
        summed = graph.node("Add", [total, self._adapted_outputs(weighed, experts, name)], f"{name}.sum")
        return [*self._by_group(weighed, experts, uses.counts, name), summed]

    def _products_of_bases(self, uses: Uses, experts: str, name: str) -> str:
        """The row of each chosen expert's base: [C, P F]. Groups that the token uses have one row each."""
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
        return graph.node("Gather", [joined, rows], f"{name}.of_base", axis=0)

    def _adapted_inputs(self, states: str, experts: str, name: str) -> str:
        """The token's products with the adapters of gate and up: [C, P F]."""
        graph, (role, *_), n_parts = self._graph, self._routed.input_roles, len(self._routed.input_roles)
        column = self._reshaped(states, f"{name}.column", [self._size, 1])
        a_CRI = self._factor(role, Form.INPUTS, experts, f"{name}.input")
        inner = graph.node("MatMul", [a_CRI, column], f"{name}.input.inner")
        inner = self._reshaped(inner, f"{name}.input.rows", [-1, n_parts, 1, self._rank])
        b_CRO = self._factor(role, Form.OUTPUTS, experts, f"{name}.input")
        b_CPRO = self._reshaped(b_CRO, f"{name}.input.parts", [-1, n_parts, self._rank, self._routed.width])
        products = graph.node("MatMul", [inner, b_CPRO], f"{name}.input.products")
        return self._reshaped(products, f"{name}.input.adapted", [-1, n_parts * self._routed.width])

    def _adapted_outputs(self, weighed: str, experts: str, name: str) -> str:
        """The sum of the adapters' products of down: [1, D]."""
        graph = self._graph
        column = self._reshaped(weighed, f"{name}.neurons", [-1, self._routed.width, 1])
        a_CRI = self._factor(Role.EXPERT_DOWN, Form.INPUTS, experts, f"{name}.down")
        inner = graph.node("MatMul", [a_CRI, column], f"{name}.down.inner")
        inner = self._reshaped(inner, f"{name}.down.row", [1, -1])
        b_CRO = self._factor(Role.EXPERT_DOWN, Form.OUTPUTS, experts, f"{name}.down")
        b_RO = self._reshaped(b_CRO, f"{name}.down.rows", [-1, self._size])
        return graph.node("MatMul", [inner, b_RO], f"{name}.down.adapted")

    def _by_group(self, weighed: str, experts: str, counts: str | None, name: str) -> list[str]:
        """The sum of neurons in each group: [1, F], or [0, F] for one that the token does not use."""
        graph = self._graph
        membership = graph.constant("bases.membership", membership_of(self._groups), np.float32)
        members = graph.node("Gather", [membership, experts], f"{name}.members", axis=0)
        sums = graph.node("FusedMatMul", [members, weighed], f"{name}.sums", domain=MICROSOFT, transA=1)
        if counts is None:
            return cut_by_group(graph, sums, self._groups, None)
        is_used = graph.node("Cast", [counts], f"{name}.is_used", to=onnx.TensorProto.BOOL)
        in_use = graph.node("Compress", [sums, is_used], f"{sums}.in_use", axis=0)
        return cut_by_group(graph, in_use, self._groups, counts)

    def of_all_tokens(self, states: str, weights: str, total: str, uses: Uses) -> Sequence[str]:
        """Adds the shares of each group's chosen experts, one expert after the other."""
        graph, name, hidden = self._graph, f"{self._name}.all", []
        for number, (group, of_base) in enumerate(zip(self._groups, uses.products, strict=True)):
            members = graph.constant("bases.members", group.members)
            of_members = graph.node("Gather", [weights, members], f"{name}.{number}.of_members", axis=1)
            places = None if uses.rows is None else uses.rows[number]
            neurons, total = self._of_group(f"{name}.{number}", members, of_members, (states, total, of_base), places)
            hidden.append(neurons)
        return [*hidden, total]

    def _of_group(
        self, name: str, members: str, of_members: str, values: tuple[str, str, str], places: str | None
    ) -> tuple[str, str]:
        """Goes through the experts that any token chose: [uses, F] and [T, D]."""
        graph, (states, total, of_base) = self._graph, values
        of_users = of_members
        if places is not None:
            tokens = self._reshaped(places, f"{name}.tokens", [-1])
            of_users = graph.node("Gather", [of_members, tokens], f"{name}.of_users", axis=0)
        largest = graph.node("ReduceMax", [of_members, graph.constant("axis.0", [0])], f"{name}.largest", keepdims=0)
        present = self._reshaped(graph.node("NonZero", [largest], f"{name}.chosen"), f"{name}.present", [-1])
        trips = graph.node("Shape", [present], f"{name}.trips")
        zeros = add_zeros(graph, of_users, self._routed.width, f"{name}.zeros")

        def one_expert(number: str, sums: Sequence[str]) -> Sequence[str]:
            place = graph.node("Gather", [present, number], f"{name}.place", axis=0)
            expert = graph.node("Gather", [members, place], f"{name}.expert", axis=0)
            own = graph.node("Gather", [of_users, place], f"{name}.own", axis=1)
            found = graph.node("NonZero", [own], f"{name}.found")
            uses = graph.node("Transpose", [found], f"{name}.uses", perm=[1, 0])
            of_tokens = uses
            if places is not None:
                rows = self._reshaped(found, f"{name}.rows", [-1])
                of_tokens = graph.node("Gather", [places, rows], f"{name}.of_tokens", axis=0)
            inputs = graph.node("GatherND", [states, of_tokens], f"{name}.inputs")
            below = graph.node("GatherND", [of_base, uses], f"{name}.below")
            hidden = self._hidden(self._adapted_rows(inputs, expert, below, name), name)
            factors = graph.node("Gather", [own, uses], f"{name}.factors", axis=0)
            weighed = graph.node("Mul", [hidden, factors], f"{name}.weighed")
            inner = self._inner(weighed, Role.EXPERT_DOWN, expert, f"{name}.down")
            outer = self._factor(Role.EXPERT_DOWN, Form.OUTPUTS, expert, f"{name}.down")
            outputs = graph.node("MatMul", [inner, outer], f"{name}.down.adapted")
            added = ((sums[0], uses, weighed), (sums[1], of_tokens, outputs))
            return [graph.node("ScatterND", row, f"{row[0]}.and_one", reduction="add") for row in added]

        neurons, summed = graph.loop(trips, [zeros, total], [f"{name}.neurons", f"{name}.sum"], one_expert)
        return neurons, summed

    def _adapted_rows(self, inputs: str, expert: str, below: str, name: str) -> str:
        """The base's products with those of an expert's adapters of gate and up added: [N, P F]."""
        graph, roles = self._graph, self._routed.input_roles
        inner = self._inner(inputs, roles[0], expert, f"{name}.input")
        outer = self._factor(roles[0], Form.OUTPUTS, expert, f"{name}.input")
        if len(roles) == 1:
            return graph.node("Gemm", [inner, outer, below], f"{name}.input.products")
        parts = zip(*(self._halves(value, axis) for value, axis in ((inner, 1), (outer, 0), (below, 1))), strict=True)
        both = [graph.node("Gemm", part, f"{part[0]}.product") for part in parts]
        return graph.node("Concat", both, f"{name}.input.products", axis=1)

    def _inner(self, values: str, role: Role, expert: str, name: str) -> str:
        """The values of one expert's tokens times the first factors of its adapters: [N, P R]."""
        factor = self._factor(role, Form.INPUTS, expert, name)
        return self._graph.node("FusedMatMul", [values, factor], f"{name}.inner", domain=MICROSOFT, transB=1)

    def _hidden(self, products: str, name: str) -> str:
        """The neurons of the products of gate and up, which lie side by side, or of up alone."""
        glu = self._routed.glu
        gate, up = self._halves(products, 1) if glu.is_gated else (None, products)
        return add_glu(self._graph, glu, gate, up, name)

    def _halves(self, values: str, axis: int) -> list[str]:
        outputs = [f"{values}.gate", f"{values}.up"]
        self._graph.node("Split", [values], outputs, axis=axis, num_outputs=2)
        return outputs

    def _factor(self, role: Role, form: Form, experts: str, name: str) -> str:
        return self._layer.weights.factor(role, self._layer.index, form, experts, f"{name}.{form.value}")

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
