"""Damaged folders of an ONNX model: its graph, its data file, onnxruntime-genai's configuration."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from tests.fuzz.places import damaged_bytes, edit, something_else
from tests.fuzz.values import NAMES, NUMBERS, damaged_json

__all__ = ["damage_onnx"]

_GRAPH, _DATA = "model.onnx", "model.onnx.data"
_INTEGERS = (0, 1, -1, 2, 3, 5, 7, 64, 1000, 2**31 - 1, -(2**31), 2**31, 2**32, 2**40, 2**62, -(2**63))


def damage_onnx(rng: random.Random, folder: Path) -> None:
    """Damages one of the folder's files."""
    kind = rng.random()
    if kind < 0.04:
        something_else(rng, folder / _GRAPH)
    elif kind < 0.1:
        something_else(rng, folder / _DATA)
    elif kind < 0.14:
        size = (folder / _DATA).stat().st_size
        os.truncate(folder / _DATA, rng.choice((1, size - 1, size // 2, 0, rng.randrange(size))))
    elif kind < 0.2:
        config = folder / "genai_config.json"
        config.write_bytes(damaged_json(rng, json.loads(config.read_text(encoding="utf-8"))))
    elif kind < 0.35:
        data = (folder / _GRAPH).read_bytes()
        (folder / _GRAPH).write_bytes(damaged_bytes(rng, data, header=len(data)))
    else:
        model = onnx.load(folder / _GRAPH, load_external_data=False)
        edit(rng, model, _EDITS)
        (folder / _GRAPH).write_bytes(model.SerializeToString())


def _attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice([node for node in model.graph.node if node.attribute])
    attribute = rng.choice(node.attribute)
    kind = rng.randrange(6)
    if kind == 0:
        node.attribute.remove(attribute)
    elif kind == 1:
        attribute.name = _utf8(rng)
    elif kind == 2:
        attribute.type = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 13))
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice((float("nan"), float("inf"), 0.0, -1.0, 1e38, 1e-38))
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = rng.choice((b"", b"\xff", b"softmax", b"x" * 5000))
    elif attribute.type == onnx.AttributeProto.INTS:
        attribute.ints[:] = rng.choice(([], [0], [1] * 9, [2**62], [-1, -1]))
    else:
        attribute.i = rng.choice(_INTEGERS)


def _utf8(rng: random.Random) -> str:
    return rng.choice(NAMES)


def _weight(rng: random.Random, model: onnx.ModelProto) -> TensorProto:
    weights = list(model.graph.initializer)
    if rng.random() < 0.3:  # those that facts are read from
        names = [
            name for node in model.graph.node if node.op_type in ("GroupQueryAttention", "QMoE") for name in node.input
        ]
        weights = [weight for weight in weights if weight.name in names] or weights
    return rng.choice(weights)


def _dimensions(rng: random.Random, model: onnx.ModelProto) -> None:
    weight = _weight(rng, model)
    dims, number = list(weight.dims), rng.choice(_INTEGERS)
    changes = (
        [],
        [0],
        [number],
        [number, *dims[1:]],
        [*dims[:-1], number],
        [*dims, 1],
        dims[1:],
        dims[::-1],
        [1] * 100,
    )
    weight.dims[:] = rng.choice((*changes, [2**32, 2**32], [2**62, 4], [0, 2**62]))


def _data_type(rng: random.Random, model: onnx.ModelProto) -> None:
    _weight(rng, model).data_type = rng.choice((*range(27), 99, -1, 2**31 - 1))


def _location(rng: random.Random, model: onnx.ModelProto) -> None:
    """Where a weight's values lie: in another file, beyond the end, nowhere."""
    weights = (*(_weight(rng, model) for _ in range(20)), *model.graph.initializer)
    weight = next((weight for weight in weights if weight.external_data), None)
    if weight is None:
        return
    kind = rng.randrange(5)
    entry = rng.choice(weight.external_data)
    if kind == 0:
        weight.external_data.remove(entry)
    elif kind == 1:
        entry.key = rng.choice((*NAMES, "location", "offset", "length"))
    elif kind == 2:
        new = weight.external_data.add()
        new.key, new.value = entry.key, rng.choice(NAMES)
    else:
        numbers = (*map(str, NUMBERS), "9" * 5000, "1e3", " 1", "0x10", "", "nan", "1_000", "\u0663")
        places = (*NAMES, _GRAPH, "tokenizer.json", "./" + _DATA, _DATA + "\x00", "MODEL.ONNX.DATA", "x/" + _DATA)
        entry.value = rng.choice(places if entry.key == "location" else numbers)


def _values_inside(rng: random.Random, model: onnx.ModelProto) -> None:
    """Values in the graph itself, more or fewer than the shape has."""
    weight = _weight(rng, model)
    if rng.random() < 0.5:
        weight.data_location = rng.choice((TensorProto.DEFAULT, TensorProto.EXTERNAL))
    if rng.random() < 0.5:
        del weight.external_data[:]
    weight.raw_data = rng.choice((b"", b"x", b"\0" * 64, b"\xff" * 4096))


def _name(rng: random.Random, model: onnx.ModelProto) -> None:
    weight = _weight(rng, model)
    weight.name = rng.choice((_utf8(rng), _weight(rng, model).name))


def _no_weight(rng: random.Random, model: onnx.ModelProto) -> None:
    model.graph.initializer.remove(_weight(rng, model))


def _one_more_weight(rng: random.Random, model: onnx.ModelProto) -> None:
    model.graph.initializer.append(_weight(rng, model))


def _ends(rng: random.Random, model: onnx.ModelProto) -> None:
    """Inputs and outputs of the graph."""
    values = rng.choice((model.graph.input, model.graph.output))
    value = rng.choice(values)
    if value.name != "logits" and rng.random() < 0.3:
        value = next((value for value in values if value.name in ("logits", "input_ids")), value)
    kind = rng.randrange(6)
    tensor = value.type.tensor_type
    if kind == 0:
        values.remove(value)
    elif kind == 1:
        value.name = rng.choice((_utf8(rng), rng.choice(values).name, "present.99.key"))
    elif kind == 2:
        tensor.elem_type = rng.choice((*range(24), 99))
    elif kind == 3 and tensor.shape.dim:
        rng.choice(tensor.shape.dim).dim_value = rng.choice(_INTEGERS)
    elif kind == 4:
        del tensor.shape.dim[rng.randrange(len(tensor.shape.dim) + 1) :]
    else:
        value.type.Clear()


def _node(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice(model.graph.node)
    if rng.random() < 0.4:
        important = [node for node in model.graph.node if node.op_type in ("QMoE", "MoE", "GroupQueryAttention")]
        node = rng.choice(important or [node])
    kind = rng.randrange(9)
    if kind == 0:
        model.graph.node.remove(node)
    elif kind == 1:
        node.op_type = rng.choice((*NAMES, "QMoE", "MoE", "GroupQueryAttention", "MatMulNBits", "Loop", "Identity"))
    elif kind == 2:
        node.domain = rng.choice((*NAMES, "com.microsoft", "ai.onnx.ml"))
    elif kind == 3:
        del node.input[rng.randrange(len(node.input) + 1) :]
    elif kind == 4 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(
            ("", _utf8(rng), rng.choice(model.graph.node).output[0])
        )
    elif kind == 5 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(
            ("", _utf8(rng), rng.choice(model.graph.node).output[0])
        )
    elif kind == 6:
        del node.output[:]
    elif kind == 7:
        model.graph.node.append(node)
    else:
        node.input.extend([rng.choice(model.graph.node).output[0]] * rng.choice((1, 20)))


def _endless(rng: random.Random, model: onnx.ModelProto) -> None:
    """The logits pass through a loop of so many turns that it never ends."""
    graph = model.graph
    if not any(output.name == "logits" for output in graph.output):
        return
    for node in graph.node:
        node.output[:] = ["logits of one turn" if name == "logits" else name for name in node.output]
    inside = [helper.make_tensor_value_info("turn", TensorProto.INT64, []), _boolean("before"), _float("x")]
    steps = [helper.make_node("Identity", ["before"], ["after"]), helper.make_node("Identity", ["x"], ["y"])]
    body = helper.make_graph(steps, "turn", inside, [_boolean("after"), _float("y")])
    turns = helper.make_tensor("turns", TensorProto.INT64, [], [2**62])
    go_on = helper.make_tensor("go on", TensorProto.BOOL, [], [True])
    graph.initializer.extend([turns, go_on])
    graph.node.append(helper.make_node("Loop", ["turns", "go on", "logits of one turn"], ["logits"], body=body))


def _boolean(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.BOOL, [])


def _float(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _model(rng: random.Random, model: onnx.ModelProto) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        model.ir_version = rng.choice((0, 1, 3, 99, -1, 2**62))
    elif kind == 1:
        del model.opset_import[:]
    elif kind == 2:
        rng.choice(model.opset_import).version = rng.choice(_INTEGERS)
    elif kind == 3:
        model.ClearField("graph")
    elif kind == 4:
        del model.graph.node[:]
    else:
        del model.graph.initializer[:]


_EDITS: tuple[Callable[[random.Random, onnx.ModelProto], None], ...] = (
    *(_attribute, _attribute, _dimensions, _dimensions, _data_type, _location, _location, _values_inside, _name),
    *(_no_weight, _one_more_weight, _ends, _ends, _node, _node, _endless, _model),
)
