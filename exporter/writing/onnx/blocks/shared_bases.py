"""Routed experts of which some stand on shared bases: each is a base plus a low-rank adapter of its own.

No expert is multiplied out. A base multiplies the tokens that chose any of its experts, once each. A loop goes over the
chosen experts: each reads its adapter, adds its share to the base's products for its own tokens, and adds what leaves
its neurons, by weight, to one sum for the base. The last product is linear, so the base multiplies these sums once a
token. Experts with matrices of their own go through ONNX Runtime's operator as usual; QMoE skips those whose weight is
0 (measured: ``moe_quantization_cpu.cc`` of 1.31 collects the others).

So the cost depends on the bases and on the chosen experts, never on the number of experts. A time of the loop costs
10 microseconds beside its products, and an adapter is read once for all tokens of a prompt.

Letters: U tokens that use a base, N tokens of one expert, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compressors.model.description.feed_forward import Routed
from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.files.onnx_names import EXPERTS_SUM, OWN_EXPERTS, WEIGHTS_OF_ALL
from compressors.model.sources.onnx_weights import Form
from exporter.writing.onnx.blocks.operators import add_experts
from exporter.writing.onnx.builder import MICROSOFT
from exporter.writing.onnx.glu import add_glu
from exporter.writing.onnx.routing import OperatorRouting, add_masked_routing
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["add_experts_on_bases"]


def add_experts_on_bases(layer: LayerNodes, routed: Routed, logits: str, normed: str, output: str) -> str:
    """Adds the choice of experts and the sum of their outputs by weight, and returns its name.

    Args:
        layer: takes the nodes.
        routed: the experts.
        logits: the router's, [batch, sequence, E].
        normed: the experts' input, [batch, sequence, D].
        output: the result's name, if the weights do not add up to 1 or are scaled; else it has one of its own.
    """
    graph, prefix, bases = layer.graph, layer.prefix, layer.spec.bases
    assert bases is not None, f"layer {layer.index} has no bases"
    bias = layer.vector(Role.SELECTION_BIAS) if routed.routing.has_selection_bias else None
    routing = add_masked_routing(graph, routed, logits, bias, prefix)
    weights = graph.node("Softmax", [routing.logits], f"{prefix}{WEIGHTS_OF_ALL}", axis=-1)
    shape = graph.constant(f"shape.rows_of_{layer.spec.hidden_size}", [-1, layer.spec.hidden_size])
    states = graph.node("Reshape", [normed, shape], f"{prefix}experts.inputs")
    total = _add_own(layer, routed, bases, routing.logits, weights, states)
    for base in (*range(bases.n_bases), SharedBases.ZERO):
        if bases.members(base):
            total = _Base(layer, routed, bases, base).add(states, weights, total)
    shape = graph.node("Shape", [normed], f"{prefix}experts.shape")
    summed = graph.node("Reshape", [total, shape], f"{prefix}{EXPERTS_SUM}")
    return summed if routing.factor is None else graph.node("Mul", [summed, routing.factor], output)


def _add_own(layer: LayerNodes, routed: Routed, bases: SharedBases, logits: str, weights: str, states: str) -> str:
    """Adds the experts with matrices of their own: [T, D]; zeros if there are none."""
    graph, name = layer.graph, f"{layer.prefix}{OWN_EXPERTS}"
    if not bases.own:
        return graph.node("Mul", [states, graph.constant("bases.nothing", 0, np.float32)], name)
    chosen = graph.constant("bases.own", bases.own)
    gates = graph.node("Gather", [weights, chosen], f"{name}.gates", axis=1)
    whole = routed.resized(len(bases.own), routed.width)
    if layer.weight(Role.EXPERT_DOWN).encoding.blocks is not None:
        # The largest weights are those of the experts that a token chose.
        routing = OperatorRouting(gates, normalizes=False, factor=None, gates=gates)
        return add_experts(layer, whole, routing, states, name)
    # MoE has no input for weights: it makes them add up to 1.
    own = graph.node("Gather", [logits, chosen], f"{name}.logits", axis=1)
    found = add_experts(layer, whole, OperatorRouting(own, normalizes=True, factor=None), states, f"{name}.mean")
    share = graph.node("ReduceSum", [gates, graph.constant("axis.last", [-1])], f"{name}.share", keepdims=1)
    return graph.node("Mul", [found, share], name)


class _Base:
    """The experts on one base, or on none."""

    def __init__(self, layer: LayerNodes, routed: Routed, bases: SharedBases, base: int) -> None:
        self._layer = layer
        self._graph = layer.graph
        self._routed = routed
        self._base: int | None = None if base == SharedBases.ZERO else base
        self._name = f"{layer.prefix}{'adapters' if self._base is None else f'base{base}'}"
        self._members = bases.members(base)
        self._places = [bases.replaced.index(expert) for expert in self._members]

    def add(self, states: str, weights: str, total: str) -> str:
        """Adds their outputs by weight to a sum: [T, D].

        Args:
            states: the experts' input, [T, D].
            weights: those of all experts, [T, E].
            total: the sum so far.
        """
        graph, name, layer = self._graph, self._name, self._layer
        for role in (*self._routed.input_roles, Role.EXPERT_DOWN):
            layer.weights.use_factors(role, layer.index)
        members = graph.constant("bases.members", self._members)
        of_tokens = graph.node("Gather", [weights, members], f"{name}.of_tokens", axis=1)
        users, rows = self._nonzero(self._largest(of_tokens, 1, "used"), "users")
        inputs = graph.node("Gather", [states, rows], f"{name}.inputs", axis=0)
        of_users = graph.node("Gather", [of_tokens, rows], f"{name}.weights", axis=0)
        _, present = self._nonzero(self._largest(of_tokens, 0, "chosen"), "present")
        outputs = self._outputs(inputs, of_users, present)
        return graph.node("ScatterND", [total, users, outputs], f"{name}.sum", reduction="add")

    def _outputs(self, inputs: str, weights: str, present: str) -> str:
        """The sums of their outputs, by weight: [U, D]."""
        graph, name, layer = self._graph, self._name, self._layer
        trips = graph.node("Shape", [present], f"{name}.trips")
        sizes = {"outputs": layer.spec.hidden_size} | ({} if self._base is None else {"hidden": self._routed.width})
        starts = [self._zeros(inputs, size, what) for what, size in sizes.items()]
        of_base = {}
        if self._base is not None:
            for role in self._routed.input_roles:
                output = f"{name}.{_short(role)}"
                of_base[role] = layer.weights.product_of_base(role, layer.index, self._base, inputs, output)

        def one_expert(number: str, sums: Sequence[str]) -> Sequence[str]:
            expert = graph.node("Gather", [present, number], f"{name}.expert", axis=0)
            return self._one_expert(expert, inputs, weights, of_base, sums)

        found = graph.loop(trips, starts, [f"{name}.{what}" for what in sizes], one_expert)
        if self._base is None:
            return found[0]
        down = layer.weights.product_of_base(Role.EXPERT_DOWN, layer.index, self._base, found[1], f"{name}.down")
        return graph.node("Add", [down, found[0]], f"{name}.both")

    def _one_expert(
        self, expert: str, inputs: str, weights: str, of_base: dict[Role, str], sums: Sequence[str]
    ) -> Sequence[str]:
        """Adds one expert's share to the sums of all: what its adapter of down makes, and its neurons."""
        graph, name = self._graph, f"{self._name}.one"
        own = graph.node("Gather", [weights, expert], f"{name}.own", axis=1)
        places, rows = self._nonzero(own, "one.rows")
        factors = graph.node("Gather", [own, places], f"{name}.factors", axis=0)
        values = graph.node("Gather", [inputs, rows], f"{name}.inputs", axis=0)
        number = graph.node("Gather", [graph.constant("bases.places", self._places), expert], f"{name}.number", axis=0)
        parts = {
            role: self._adapted(role, number, values, None if role not in of_base else (of_base[role], rows))
            for role in self._routed.input_roles
        }
        hidden = add_glu(graph, self._routed.glu, parts.get(Role.EXPERT_GATE), parts[Role.EXPERT_UP], name)
        weighed = graph.node("Mul", [hidden, factors], f"{name}.weighed")
        added = [self._adapted(Role.EXPERT_DOWN, number, weighed, None), weighed]
        return [
            graph.node("ScatterND", [before, places, more], f"{before}.and_one", reduction="add")
            for before, more in zip(sums, added, strict=False)
        ]

    def _adapted(self, role: Role, number: str, values: str, below: tuple[str, str] | None) -> str:
        """The values times an expert's adapter, plus the base's products at the expert's rows: [N, outputs]."""
        graph, layer, name = self._graph, self._layer, f"{self._name}.one.{_short(role)}"
        a_RI, b_RO = (
            layer.weights.factor(role, layer.index, form, number, f"{name}.{form.value}")
            for form in (Form.INPUTS, Form.OUTPUTS)
        )
        inner = graph.node("FusedMatMul", [values, a_RI], f"{name}.inner", domain=MICROSOFT, transB=1)
        if below is None:
            return graph.node("MatMul", [inner, b_RO], name)
        of_base = graph.node("Gather", list(below), f"{name}.of_base", axis=0)
        return graph.node("Gemm", [inner, b_RO, of_base], name)

    def _largest(self, weights: str, axis: int, what: str) -> str:
        axes = self._graph.constant(f"axis.{axis}", [axis])
        return self._graph.node("ReduceMax", [weights, axes], f"{self._name}.{what}", keepdims=0)

    def _nonzero(self, vector: str, what: str) -> tuple[str, str]:
        """The places of a vector's values that are not 0: [places, 1] and [places]."""
        graph, name = self._graph, f"{self._name}.{what}"
        found = graph.node("NonZero", [vector], f"{name}.row")
        column = graph.node("Transpose", [found], f"{name}.column", perm=[1, 0])
        return column, graph.node("Reshape", [found, graph.constant("shape.flat", [-1])], name)

    def _zeros(self, inputs: str, size: int, what: str) -> str:
        """Zeros for each token that uses the base: [U, size]."""
        graph, name = self._graph, f"{self._name}.{what}.none"
        row = graph.constant(f"bases.none_of_{size}", np.zeros((1, size)), np.float32)
        shape = graph.node("Shape", [inputs], f"{name}.rows", start=0, end=1)
        one = graph.node("Concat", [shape, graph.constant("axis.1", [1])], f"{name}.times", axis=0)
        return graph.node("Expand", [row, one], name)


def _short(role: Role) -> str:
    return {Role.EXPERT_GATE: "gate", Role.EXPERT_UP: "up"}.get(role, "down")
