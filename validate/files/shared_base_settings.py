"""The attributes and constants of our own ONNX graphs in layers whose experts stand on shared bases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx

from compressors.model.description.shared_bases import SharedBases
from compressors.model.description.spec import LayerSpec

__all__ = ["attributes_beside_bases", "constants_of_bases"]

_OURS = re.compile(r"(layers\.\d+\.)?(bases|adapted|experts\.own)\.(?P<name>.*)")
_INT64, _BOOL = onnx.TensorProto.INT64, onnx.TensorProto.BOOL
_GATHERED_COLUMNS = ("of_replaced", "gates", "logits", "row", "of_members", "own")
"""The last parts of the names of values that are gathered along their second axis."""
_SPLIT_ROWS = re.compile(r"(inputs|column|.*rows_of_sums\.in_use)\.\d+|all\.\d+\.input\.adapted\.gate")
"""The ends of the names of values that are cut along their first axis."""

_ALLOWED = Mapping[str, tuple[Any, ...]]
_OF_OPERATORS: Mapping[str, _ALLOWED] = {
    "Cast": {"to": (_INT64,)},
    "CumSum": {"exclusive": (0, None), "reverse": (0, None)},
    "Compress": {"axis": (0,)},
    "ScatterND": {"reduction": (b"add",)},
    "Transpose": {"perm": ([1, 0],)},
    "ReduceMax": {"keepdims": (0,), "noop_with_empty_axes": (0, None)},
    "ReduceSum": {"keepdims": (0,), "noop_with_empty_axes": (0, None)},
    "GatherND": {"batch_dims": (0, None)},
    "Shape": {"start": (0, None), "end": (1, None)},
}


def attributes_beside_bases(node: onnx.NodeProto) -> dict[str, tuple[Any, ...]]:
    """The values allowed for a node of such a layer, which its names identify."""
    ours = _OURS.match(node.output[0])
    if ours is None:
        return {}
    name = ours["name"]
    last = name.rpartition(".")[2]
    allowed = dict(_OF_OPERATORS.get(node.op_type, {}))
    if node.op_type == "Cast" and last == "is_used":
        allowed["to"] = (_BOOL,)
    if node.op_type == "Gather":
        allowed["axis"] = (1,) if last in _GATHERED_COLUMNS else (0, None)
    if node.op_type == "Concat":
        allowed["axis"] = (1,) if last == "side_by_side" else (0,)
    if node.op_type == "Split":
        allowed["axis"] = (0, None) if _SPLIT_ROWS.fullmatch(name) else (1,)
    if node.op_type == "FusedMatMul":
        is_turned = name == "one.input.adapted"
        allowed["transA"] = (1,) if is_turned else (0, None)
        allowed["transB"] = (0, None) if is_turned else (1,)
    if node.op_type == "ReduceSum" and last == "share":
        allowed["keepdims"] = (1, None)
    return allowed


def constants_of_bases(layer: LayerSpec) -> dict[str, Any]:
    """The constants that a layer's nodes use, if they are there."""
    bases = layer.bases
    if bases is None:
        return {}
    return {"bases.own": list(bases.own), "bases.replaced": list(bases.replaced), "bases.group": _groups(bases)}


def _groups(bases: SharedBases) -> list[list[int]]:
    """The number of the group of each expert that stands on a base, in a column: those without a base come last."""
    numbers = [bases.base_of[expert] for expert in bases.replaced]
    return [[bases.n_bases if number is None or number == SharedBases.ZERO else number] for number in numbers]
