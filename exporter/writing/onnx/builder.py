"""Collects nodes and initialisers of an ONNX graph; weights stay in the data file and are only pointed at."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from exporter.writing.onnx.layout import DATA_FILE, TensorPlan

__all__ = ["MICROSOFT", "GraphBuilder"]

MICROSOFT = "com.microsoft"
_ONNX_OPSET = 23  # the first with RMSNormalization
_MICROSOFT_OPSET = 1
_IR_VERSION = 11  # the first that opset 23 allows
_PRODUCER = "moe-export"


class GraphBuilder:
    """A graph in the making. Nodes are named after their first output."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._made: set[str] = set()
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[str, npt.NDArray[Any]] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def add_input(self, name: str, dtype: int, dimensions: Sequence[str | int]) -> str:
        """Declares a graph input; symbolic dimensions are texts."""
        self._inputs.append(onnx.helper.make_tensor_value_info(name, dtype, dimensions))
        return name

    def add_input_with_default(self, name: str, value: int) -> str:
        """Declares an int64 scalar that a client may feed; otherwise it has the value."""
        self._initializers[name] = onnx.numpy_helper.from_array(np.array(value, dtype=np.int64), name)
        return self.add_input(name, onnx.TensorProto.INT64, [])

    def add_output(self, name: str, dtype: int, dimensions: Sequence[str | int]) -> None:
        """Declares a value that a node has made as a graph output."""
        self._outputs.append(onnx.helper.make_tensor_value_info(name, dtype, dimensions))

    def node(
        self, op: str, inputs: Sequence[str], output: str | Sequence[str], *, domain: str = "", **attributes: Any
    ) -> str:
        """Adds a node and returns its first output; an empty text is an input or output that is left out."""
        outputs = [output] if isinstance(output, str) else list(output)
        n_inputs = max((place for place, name in enumerate(inputs, start=1) if name), default=0)
        assert outputs[0] not in self._made, f"two nodes make {outputs[0]}"
        self._made.add(outputs[0])
        name = f"{outputs[0]}/{op}"
        node = onnx.helper.make_node(op, inputs[:n_inputs], outputs, name=name, domain=domain, **attributes)
        self._nodes.append(node)
        return outputs[0]

    def once(self, name: str, add: Callable[[str], str]) -> str:
        """Returns a value of the whole graph that several layers use: the first of them adds its node."""
        return name if name in self._made else add(name)

    def choice(self, condition: str, output: str, *, then: Callable[[], str], otherwise: Callable[[], str]) -> str:
        """Adds two ways to make a float32 value, one of which runs, and returns its name.

        Args:
            condition: a truth value.
            output: the value's name.
            then: adds the nodes of the way for true, and returns what they make.
            otherwise: the same for false.
        """
        return self.choices(condition, [output], then=lambda: [then()], otherwise=lambda: [otherwise()])[0]

    def choices(
        self,
        condition: str,
        outputs: Sequence[str],
        *,
        then: Callable[[], Sequence[str]],
        otherwise: Callable[[], Sequence[str]],
    ) -> Sequence[str]:
        """Adds two ways to make some float32 values, as :meth:`choice` does for one, and returns their names."""
        branches = {
            "then_branch": self._branch(f"{outputs[0]}.then", then),
            "else_branch": self._branch(f"{outputs[0]}.else", otherwise),
        }
        self.node("If", [condition], outputs, **branches)
        return outputs

    def loop(
        self,
        trips: str,
        carried: Sequence[str],
        outputs: Sequence[str],
        body: Callable[[str, Sequence[str]], Sequence[str]],
    ) -> Sequence[str]:
        """Adds nodes that run so many times, each time on what they made before, and returns the last results' names.

        Args:
            trips: the number of times, int64 [1].
            carried: names of float32 values at the start.
            outputs: names of the results.
            body: adds the nodes of one time; takes the name of its number, a scalar, and those of the values that the
                time before it left, and returns the names of the new ones.
        """
        name = outputs[0]
        number, condition = f"{name}.number", f"{name}.goes_on"
        before = [f"{output}.before" for output in outputs]
        always = self.constant("true", True, np.bool_)
        outside, self._nodes = self._nodes, []
        after = body(number, before)
        self.node("Identity", [condition], f"{condition}.still")
        floats, scalar = onnx.TensorProto.FLOAT, onnx.helper.make_tensor_value_info
        inputs = [scalar(number, onnx.TensorProto.INT64, []), scalar(condition, onnx.TensorProto.BOOL, [])]
        inputs += [scalar(value, floats, None) for value in before]
        results = [scalar(f"{condition}.still", onnx.TensorProto.BOOL, [])]
        results += [scalar(value, floats, None) for value in after]
        graph = onnx.helper.make_graph(self._nodes, f"{name}.body", inputs, results)
        self._nodes = outside
        self.node("Loop", [trips, always, *carried], outputs, body=graph)
        return outputs

    def _branch(self, name: str, add: Callable[[], Sequence[str]]) -> onnx.GraphProto:
        """The nodes that a function adds, as a graph of their own; they may use values from outside."""
        outside, self._nodes = self._nodes, []
        results = [onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None) for value in add()]
        branch = onnx.helper.make_graph(self._nodes, name, [], results)
        self._nodes = outside
        return branch

    def constant(self, name: str, values: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> str:
        """Adds a small constant, stored in the graph itself, and returns its name.

        The same values under the same name are stored once; other values get a number behind the name.
        """
        array, number = np.asarray(values, dtype=dtype), itertools.count(2)
        key = name
        while key in self._constants and not np.array_equal(self._constants[key], array):
            key = f"{name}.{next(number)}"
        if key not in self._constants:
            self._constants[key] = array
            self._initializers[key] = onnx.numpy_helper.from_array(array, key)
        return key

    def external(self, tensor: TensorPlan, shape: Sequence[int] | None = None, name: str | None = None) -> str:
        """Adds a tensor of the data file; ``shape`` and ``name`` give the same bytes a second appearance."""
        name = tensor.name if name is None else name
        if name not in self._initializers:
            proto = onnx.TensorProto(
                name=name,
                data_type=tensor.onnx_type,
                dims=tensor.shape if shape is None else shape,
                data_location=onnx.TensorProto.EXTERNAL,
            )
            for key, value in (("location", DATA_FILE), ("offset", tensor.offset), ("length", tensor.n_bytes)):
                proto.external_data.add(key=key, value=str(value))
            self._initializers[name] = proto
        return name

    def model(self, graph_name: str) -> onnx.ModelProto:
        """The finished model."""
        graph = onnx.helper.make_graph(
            self._nodes, graph_name, self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [onnx.helper.make_opsetid("", _ONNX_OPSET), onnx.helper.make_opsetid(MICROSOFT, _MICROSOFT_OPSET)]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name=_PRODUCER)
