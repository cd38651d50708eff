"""The share of experts with adapters in a layer whose experts stand on bases.

For one token all chosen experts go together, in products of many matrices. For several tokens a loop goes over the
chosen experts of each group, so that the adapter of each is read once, and the memory is that of the tokens' rows. A
time of the loop costs 10 microseconds beside its products.

Letters: C chosen experts of one token, N tokens of one expert, P matrices that read the input, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from compressors.model.description.feed_forward import Routed
from compressors.model.description.roles import Role
from compressors.model.sources.onnx_weights import Form
from exporter.writing.onnx.blocks.uses import GroupUses, Uses, add_zeros
from exporter.writing.onnx.builder import MICROSOFT, GraphBuilder
from exporter.writing.onnx.glu import add_glu
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["add_adapted_experts"]


def add_adapted_experts(layer: LayerNodes, routed: Routed, states: str, weights: str, uses: Uses) -> Sequence[str]:
    """Adds the experts' products but those of the bases.

    Args:
        layer: takes the nodes.
        routed: the experts.
        states: the experts' input, [T, D].
        weights: those of all experts, [T, E].
        uses: the products of bases.

    Returns:
        The names of the sums of neurons by weight, in the form of ``uses``, and the name of the sum of the
        outputs of all adapters, [T, D].
    """
    experts = _Experts(layer, routed, uses, f"{layer.prefix}adapted")
    graph = layer.graph
    for role in (routed.input_roles[0], Role.EXPERT_DOWN):
        layer.weights.use_factors(role, layer.index)
    is_one = graph.once("adapted.is_one", lambda name: _is_one_token(graph, states, name))
    return graph.choices(
        is_one,
        [*(f"{layer.prefix}adapted.hidden.{number}" for number in range(uses.n_sums)), f"{layer.prefix}adapted.sum"],
        then=lambda: experts.of_one_token(states, weights),
        otherwise=lambda: experts.of_all_tokens(states, weights),
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
    of_base: GroupUses


class _Experts:
    def __init__(self, layer: LayerNodes, routed: Routed, uses: Uses, name: str) -> None:
        self._layer = layer
        self._graph = layer.graph
        self._routed = routed
        self._uses = uses
        self._name = name

    def of_one_token(self, states: str, weights: str) -> Sequence[str]:
        """Adds up the shares of all experts that the only token chose, at a time."""
        graph, name = self._graph, f"{self._name}.one"
        weights = self._of_replaced(weights, name)
        found = graph.node("NonZero", [weights], f"{name}.found")
        experts = graph.node("Gather", [found, graph.constant("one", 1)], f"{name}.experts", axis=0)
        groups = self._uses.groups_of(experts, name)
        products, of_base = self._adapted_inputs(states, experts, name), self._uses.of_experts(groups, name)
        if of_base is not None:
            products = graph.node("Add", [of_base, products], f"{name}.products")
        hidden = self._hidden(self._parts(products, axis=1), name)
        row = graph.node("Gather", [weights, experts], f"{name}.row", axis=1)
        factors = self._reshaped(row, f"{name}.weights", [-1, 1, 1, 1])
        weighed = graph.node("Mul", [hidden, factors], f"{name}.weighed")
        return [*self._uses.sums_of_experts(weighed, groups, name), self._outputs(weighed, experts, name)]

    def _outputs(self, neurons: str, experts: str, name: str) -> str:
        """The neurons times the adapters of down, added up: [1, D], from all experts' factors side by side."""
        graph = self._graph
        first, second = self._factors(Role.EXPERT_DOWN, experts, f"{name}.down")
        inner = graph.node("FusedMatMul", [neurons, first], f"{name}.down.inner", domain=MICROSOFT, transB=1)
        row = self._reshaped(inner, f"{name}.down.row", [1, -1])
        rows = self._reshaped(second, f"{name}.down.rows", [-1, self._layer.spec.expert_size])
        return graph.node("MatMul", [row, rows], f"{name}.outputs")

    def _of_replaced(self, weights: str, name: str) -> str:
        """The weights of the experts that stand on bases: [T, experts on bases]."""
        bases = self._layer.spec.bases
        assert bases is not None, f"layer {self._layer.index} has no bases"
        replaced = self._graph.constant("bases.replaced", bases.replaced)
        return self._graph.node("Gather", [weights, replaced], f"{name}.of_replaced", axis=1)

    def _adapted_inputs(self, states: str, experts: str, name: str) -> str:
        """The token times the adapters of gate and up: [C, P, 1, F]. C may be 0, to which no product is broadcast."""
        graph = self._graph
        first, second = self._factors(self._routed.input_roles[0], experts, f"{name}.input")
        column = self._reshaped(states, f"{name}.column", [self._layer.spec.expert_size, 1])
        inner = graph.node("MatMul", [first, column], f"{name}.input.inner")
        return graph.node("FusedMatMul", [inner, second], f"{name}.input.adapted", domain=MICROSOFT, transA=1)

    def of_all_tokens(self, states: str, weights: str) -> Sequence[str]:
        """Adds up the shares of each group's chosen experts, one expert after the other."""
        graph, sums = self._graph, []
        weights = self._of_replaced(weights, f"{self._name}.all")
        total = add_zeros(graph, states, self._layer.spec.expert_size, f"{self._name}.all.nothing")
        of_groups = self._uses.of_groups(states, f"{self._name}.all.of_groups")
        for number, (group, of_base) in enumerate(zip(self._uses.groups, of_groups, strict=True)):
            name = f"{self._name}.all.{number}"
            members = graph.constant("bases.members", group.members)
            of_members = graph.node("Gather", [weights, members], f"{name}.of_members", axis=1)
            of_users = of_members
            if of_base.places is not None:
                tokens = self._reshaped(of_base.places, f"{name}.tokens", [-1])
                of_users = graph.node("Gather", [of_members, tokens], f"{name}.of_users", axis=0)
            present = self._present(of_members, name)
            neurons, total = self._of_group(_Group(members, present, of_users, states, of_base), total, name)
            sums.append(neurons)
        return [*self._uses.sums_of_groups(sums, f"{self._name}.all"), total]

    def _present(self, weights: str, name: str) -> str:
        """The numbers of the experts that any token chose."""
        graph = self._graph
        largest = graph.node("ReduceMax", [weights, graph.constant("axis.0", [0])], f"{name}.largest", keepdims=0)
        return self._reshaped(graph.node("NonZero", [largest], f"{name}.chosen"), f"{name}.present", [-1])

    def _of_group(self, group: _Group, total: str, name: str) -> Sequence[str]:
        """Goes through these experts: the sum of their neurons, [uses, F], and that of adapters' outputs, [T, D]."""
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
        if group.of_base.places is not None:
            rows = self._reshaped(found, f"{name}.rows", [-1])
            tokens = graph.node("Gather", [group.of_base.places, rows], f"{name}.its_tokens", axis=0)
        inputs = graph.node("GatherND", [group.states, tokens], f"{name}.inputs")
        of_base = graph.node("GatherND", [group.of_base.products, uses], f"{name}.of_base")
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
