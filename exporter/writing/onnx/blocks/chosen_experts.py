"""Routed experts by nodes, for functions that ONNX Runtime's operators for experts do not compute on the CPU.

The rows of all tokens are sorted by their experts, and each expert multiplies its own rows, of which there may be none:
products of no rows cost next to nothing. A step of a model takes 1.3 times as long as with QMoE's SwiGLU, and a prompt
1.06 times (``benchmarks/results/onnx_experts.md``). To gather the chosen experts' codes and widen them, by operators
that can, takes 15 times as long.

Letters: R rows, one for each token and each of its experts.
"""

from __future__ import annotations

import onnx

from compressors.model.description.feed_forward import Routed
from compressors.model.description.roles import Role
from compressors.model.files.onnx_names import BY_EXPERT, CHOSEN_LOGITS, CHOSEN_WEIGHTS
from exporter.writing.onnx.glu import add_glu
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["add_chosen_experts"]


def add_chosen_experts(layer: LayerNodes, routed: Routed, logits: str, normed: str, output: str) -> str:
    """Adds the choice of experts, their products and the sum of their outputs by weight.

    Args:
        layer: takes the nodes.
        routed: the experts.
        logits: the router's, [batch, sequence, E].
        normed: the experts' input, [batch, sequence, D], or [batch, sequence, I].
        output: the result's name.
    """
    return _Experts(layer, routed, f"{layer.prefix}experts").add(logits, normed, output)


class _Experts:
    def __init__(self, layer: LayerNodes, routed: Routed, name: str) -> None:
        self._layer = layer
        self._graph = layer.graph
        self._routed = routed
        self._name = name

    def add(self, logits: str, normed: str, output: str) -> str:
        graph, name, n_chosen = self._graph, self._name, self._routed.top_k
        chosen, weights = self._choice(logits)
        flat = graph.node("Reshape", [chosen, graph.constant("shape.flat", [-1])], f"{name}.of_rows")
        count = graph.node("Shape", [flat], f"{name}.rows")
        graph.node("Greater", [count, graph.constant("axis.0", [0])], f"{name}.has_rows")
        graph.node("TopK", [flat, count], [f"{name}.sorted", f"{name}.order"], axis=0, largest=0)
        tokens = graph.node("Div", [f"{name}.order", graph.constant(f"number_{n_chosen}", n_chosen)], f"{name}.tokens")
        states = graph.node("Reshape", [normed, self._shape(self._layer.spec.expert_size)], f"{name}.states")
        rows = graph.node("Gather", [states, tokens], f"{name}.inputs", axis=0)
        counts = self._counts(flat)
        hidden = self._hidden(self._products(Role.EXPERT_GATE, rows, counts, "gate_up"))
        outputs = self._products(Role.EXPERT_DOWN, hidden, counts, "down")
        return self._summed(outputs, weights, normed, output)

    def _choice(self, logits: str) -> tuple[str, str]:
        """The experts of each token and their weights: [batch, sequence, K]."""
        graph, name, prefix = self._graph, self._name, self._layer.prefix
        best = graph.constant(f"best_{self._routed.top_k}", [self._routed.top_k])
        graph.node("TopK", [logits, best], [f"{prefix}{CHOSEN_LOGITS}", f"{name}.chosen"], axis=-1)
        scales = self._layer.vector(Role.EXPERT_SCALE)
        of_choice = f"{prefix}{CHOSEN_WEIGHTS}"
        normalized = of_choice if scales is None else f"{name}.unscaled_weights"
        weights = graph.node("Softmax", [f"{prefix}{CHOSEN_LOGITS}"], normalized, axis=-1)
        if scales is not None:
            of_chosen = graph.node("Gather", [scales, f"{name}.chosen"], f"{name}.scales", axis=0)
            weights = graph.node("Mul", [weights, of_chosen], of_choice)
        return f"{name}.chosen", weights

    def _counts(self, flat: str) -> str:
        """The number of rows of each expert: int64 [E]."""
        graph, name, n_experts = self._graph, self._name, self._routed.n_experts
        column = graph.node("Unsqueeze", [flat, graph.constant("axis.1", [1])], f"{name}.column")
        numbers = graph.constant(f"experts.{n_experts}", [list(range(n_experts))])
        equal = graph.node("Equal", [column, numbers], f"{name}.is_expert")
        ones = graph.node("Cast", [equal], f"{name}.ones", to=onnx.TensorProto.INT64)
        return graph.node("ReduceSum", [ones, graph.constant("axis.0", [0])], f"{name}.counts", keepdims=0)

    def _products(self, role: Role, rows: str, counts: str, what: str) -> str:
        """Each expert's rows times its matrix, under each other.

        They are a graph of their own, which always runs: when ONNX Runtime loads a graph, it compares each value with
        all that are no longer needed, and among the products of all layers that would take minutes.
        """
        graph, name = self._graph, f"{self._name}.{what}"

        def products() -> str:
            inputs = [f"{name}.{expert}.inputs{BY_EXPERT}" for expert in range(self._routed.n_experts)]
            graph.node("Split", [rows, counts], inputs, axis=0)
            outputs = self._layer.products_of_experts(role, inputs, name)
            return graph.node("Concat", outputs, f"{name}{BY_EXPERT}", axis=0)

        def nothing() -> str:
            return graph.node("Identity", [rows], f"{name}.nothing")

        has_rows = f"{self._name}.has_rows"
        return graph.choice(has_rows, name, then=products, otherwise=nothing)

    def _hidden(self, gate_up: str) -> str:
        """The values between the products: [R, F]; gates and ups alternate."""
        graph, name, width = self._graph, self._name, self._layer.spec.expert_width
        pairs = graph.node(
            "Reshape", [gate_up, graph.constant(f"shape.pairs_{width}", [-1, width, 2])], f"{name}.pairs"
        )
        gate, up = self._layer.split(pairs, [1, 1], "glu")
        hidden = add_glu(graph, self._routed.glu, gate, up, name)
        return graph.node("Reshape", [hidden, self._shape(width)], f"{name}.neurons")

    def _summed(self, outputs: str, weights: str, normed: str, output: str) -> str:
        """The sum over each token's experts, by weight, in the shape of the input."""
        graph, name, n_chosen, size = self._graph, self._name, self._routed.top_k, self._layer.spec.expert_size
        count = graph.node("Squeeze", [f"{name}.rows"], f"{name}.count")
        limits = graph.constant("zero", 0), graph.constant("one", 1)
        places = graph.node("Range", [limits[0], count, limits[1]], f"{name}.places")
        order = f"{name}.order"
        back = graph.node("ScatterElements", [order, order, places], f"{name}.back", axis=0)
        in_order = graph.node("Gather", [outputs, back], f"{name}.in_order", axis=0)
        by_token = graph.constant(f"shape.of_{n_chosen}_by_token", [-1, n_chosen, size])
        of_tokens = graph.node("Reshape", [in_order, by_token], f"{name}.by_token")
        row = graph.constant(f"shape.row_of_{n_chosen}", [-1, 1, n_chosen])
        of_weights = graph.node("Reshape", [weights, row], f"{name}.weights_by_token")
        summed = graph.node("MatMul", [of_weights, of_tokens], f"{name}.summed")
        return graph.node("Reshape", [summed, graph.node("Shape", [normed], f"{name}.shape")], output)

    def _shape(self, columns: int) -> str:
        return self._graph.constant(f"shape.rows_of_{columns}", [-1, columns])
