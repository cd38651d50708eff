"""The attributes that an ONNX graph must have to compute what ``config.json`` describes.

A graph keeps its numbers in the attributes of its nodes, in small constants, and in tables of cosines and sines. Those
that every exporter needs are judged in any graph; the nodes that prepare masks and shapes only in ours, whose names
tell what they are for. Operators: onnxruntime's ``docs/ContribOperators.md`` and the ONNX specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from compressors.model.description.spec import ModelSpec
from compressors.model.files.onnx_graph import external_place

__all__ = ["graph_setting_symptoms", "rotary_symptoms"]

_OURS = "moe-export"  # producer_name
_ATTENTION = ("GroupQueryAttention", "MultiHeadAttention", "Attention")
_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
_EXPERTS = ("MoE", "QMoE")
_HARMLESS = frozenset({"accuracy_level", "stash_type"})  # how exactly something is computed, not what
_POSITIONS_AT_ONCE = 4096

_PREPARATION: Mapping[tuple[str, str], Any] = {
    ("mask.int32", "to"): onnx.TensorProto.INT32,
    ("mask.last_positions", "to"): onnx.TensorProto.INT32,
    ("mask.total_length", "to"): onnx.TensorProto.INT32,
    ("mask.lead", "axis"): 1,
    ("mask.lead", "keepdims"): 0,
    ("mask.lead", "select_last_index"): 0,
    ("mask.tokens", "keepdims"): 0,
    ("mask.tokens", "noop_with_empty_axes"): 0,
    ("mask.columns", "axis"): 0,
    ("mask.bias_shape", "axis"): 0,
    ("sequence.length", "start"): 1,
    ("sequence.length", "end"): 2,
    ("embedding", "axis"): 0,
}
"""Attributes of our graphs' nodes that feed the others, by the node's first output."""

_CONSTANTS: Mapping[str, Any] = {
    "zero": 0,
    "one": 1,
    "axis.1": [1],
    "axes.1_2": [1, 2],
    "ones": [1],
    "bias.removed": -1e9,
    "bias.kept": 0,
    "true": True,
}


def graph_setting_symptoms(path: Path, spec: ModelSpec) -> list[str]:
    """Lists where a graph's attributes, constants and rotary tables do not fit a model of this shape.

    Args:
        path: the ``.onnx`` file, which is readable.
        spec: of the model that it should compute.
    """
    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    symptoms: dict[str, list[str]] = {}  # what is wrong, and the nodes where it is
    layer = -1
    for node in model.graph.node:
        layer += node.op_type in _ATTENTION
        found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        allowed = _allowed(node, spec, max(layer, 0), weights)
        if model.producer_name == _OURS:
            allowed |= _of_ours(node)
        for name, values in allowed.items():
            if name in found and not any(_is_same(found[name], value) for value in values):
                sentence = (
                    f"{node.op_type} {name}: {_shown(found[name])} in the graph, the model's is {_shown(values[0])}"
                )
                symptoms.setdefault(sentence, []).append(node.output[0])
            elif name not in found and None not in values:
                sentence = f"{node.op_type} {name}: absent in the graph, the model's is {_shown(values[0])}"
                symptoms.setdefault(sentence, []).append(node.output[0])
        for name in (
            found.keys() - allowed.keys() - _HARMLESS if node.op_type in (*_ATTENTION, *_NORMS, *_EXPERTS) else ()
        ):
            symptoms.setdefault(f"{node.op_type} {name}: the model has no such setting", []).append(node.output[0])
    found_symptoms = [f"{sentence} ({_places(nodes)})" for sentence, nodes in symptoms.items()]
    if model.producer_name == _OURS:
        found_symptoms += _constant_symptoms(weights, spec)
    return [*found_symptoms, *_table_symptoms(model.graph, weights, path.parent, spec)]


_Allowed = dict[str, tuple[Any, ...]]  # None among the values: the attribute may be absent


def _allowed(node: onnx.NodeProto, spec: ModelSpec, layer: int, weights: Mapping[str, onnx.TensorProto]) -> _Allowed:
    """Attributes of an operator that any exporter uses, with the values that are right."""
    kind = node.op_type
    if kind in _NORMS:
        axis: _Allowed = {} if kind.startswith("Skip") else {"axis": (-1, None)}
        return axis | {"epsilon": (spec.rms_norm_eps,)}
    if kind in _ATTENTION:
        return _attention(node, spec)
    if kind in _EXPERTS:
        return _experts(node, spec.layer(layer), weights)
    if kind == "RotaryEmbedding":
        return {"interleaved": (0, None), "scale": (1.0, None)}
    if kind == "MatMulNBits" and _has_axes(weights.get(_input(node, 1)), 3):
        return _quantized_matrix(node, spec, weights)
    if kind == "GatherBlockQuantized":
        return {"gather_axis": (0, None), "quantize_axis": (1, -1), "bits": (_row_bits(node, spec, weights), None)} | (
            _block_size(node, weights, 2, spec.hidden_size)
        )
    if kind == "FusedMatMul":
        return {"alpha": (1.0, None), "transA": (0, None), "transBatchA": (0, None), "transBatchB": (0, None)}
    return {"axis": (-1, None)} if kind == "Softmax" else {}


def _attention(node: onnx.NodeProto, spec: ModelSpec) -> _Allowed:
    allowed: _Allowed = {
        "num_heads": (spec.n_heads,),
        "scale": (1.0 / math.sqrt(spec.head_dim), 0.0, None),
        "softcap": (0.0, None),
        "smooth_softmax": (0, None),
        "local_window_size": (-1, spec.window or -1, None),
        "mask_filter_value": (-10000.0, None),
        "unidirectional": (1, 0, None),
    }
    if node.op_type == "GroupQueryAttention":
        allowed |= {"kv_num_heads": (spec.n_kv_heads,), "rotary_interleaved": (0, None)}
        # another exporter may rotate before
        allowed["do_rotary"] = (1,) if len(node.input) > 7 and node.input[7] else (0, None)
        allowed |= dict.fromkeys(("qk_output", "kv_cache_bit_width"), (0, None))
    return allowed


def _experts(node: onnx.NodeProto, layer: ModelSpec, weights: Mapping[str, onnx.TensorProto]) -> _Allowed:
    has_gates = len(node.input) > 14 and bool(node.input[14])  # they decide by themselves whether to normalise
    normalizes = int(layer.normalize_top_k)
    allowed: _Allowed = {
        "k": (layer.top_k,),
        "normalize_routing_weights": (normalizes, *((0, 1, None) if has_gates else () if normalizes else (None,))),
        "activation_type": (b"swiglu", b"silu"),
        "activation_alpha": (1.0,),
        "activation_beta": (0.0, None),
        "swiglu_fusion": (1, 2),
        "swiglu_limit": (math.inf, None),
        "use_sparse_mixer": (0, None),
    }
    if node.op_type == "QMoE" and _has_axes(weights.get(_input(node, 2)), 3):
        codes = weights[_input(node, 2)].dims
        allowed |= {
            "expert_weight_bits": (8 * codes[-1] // layer.hidden_size, None),
            "weights_prepacked": (0, -1, None),
            "quant_type": (b"int", None),
        }
        allowed |= _block_size(node, weights, 3, layer.hidden_size)
    return allowed


def _quantized_matrix(node: onnx.NodeProto, spec: ModelSpec, weights: Mapping[str, onnx.TensorProto]) -> _Allowed:
    """Codes are [N, blocks, bytes of a block]; K is one of the widths that the model has."""
    rows, blocks, block_bytes = weights[node.input[1]].dims
    numbers = {attribute.name: attribute.i for attribute in node.attribute if attribute.type == _WHOLE_NUMBER}
    widths = (spec.hidden_size, spec.n_heads * spec.head_dim, spec.expert_width)
    block, blocks = numbers.get("block_size", 0), max(1, blocks)
    fitting = [width for width in widths if width % blocks == 0 and (block_bytes * blocks * 8) % width == 0]
    columns = numbers["K"] if numbers.get("K") in fitting else (fitting or widths)[0]
    if -(-columns // max(1, block)) == blocks and block * numbers.get("bits", 4) == 8 * block_bytes:
        return {"N": (rows,), "K": (columns,)}
    return {
        "N": (rows,),
        "K": (columns,),
        "bits": (8 * block_bytes * blocks // columns, None),
        "block_size": (columns // blocks,),
    }


def _row_bits(node: onnx.NodeProto, spec: ModelSpec, weights: Mapping[str, onnx.TensorProto]) -> int | None:
    codes = weights.get(_input(node, 0))
    return None if codes is None or not codes.dims else 8 * codes.dims[-1] // spec.hidden_size


def _block_size(
    node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto], scales_input: int, columns: int
) -> _Allowed:
    """The block size that the scales' shape tells; scales may be cast before they are used."""
    name = _input(node, scales_input).removesuffix(".float32")
    if name not in weights or len(weights[name].dims) < 2 or columns % max(1, weights[name].dims[-1]):
        return {}
    return {"block_size": (columns // max(1, weights[name].dims[-1]),)}


def _input(node: onnx.NodeProto, place: int) -> str:
    """Its name; empty where the node has no such input."""
    return str(node.input[place]) if place < len(node.input) else ""


def _has_axes(weight: onnx.TensorProto | None, number: int) -> bool:
    return weight is not None and len(weight.dims) == number


def _of_ours(node: onnx.NodeProto) -> _Allowed:
    """The values allowed for a node that only the names in our own graphs identify."""
    output = node.output[0]
    allowed: _Allowed = {name: (value,) for (place, name), value in _PREPARATION.items() if place == output}
    for name in ("select_last_index", "noop_with_empty_axes"):
        if name in allowed:
            allowed[name] = (0, None)
    if node.op_type == "Gather" and output == "embedding":
        allowed["axis"] = (0, None)
    if node.op_type == "GatherBlockQuantized":
        allowed.pop("axis", None)
    if node.op_type == "FusedMatMul":
        allowed["transB"] = (1,)
    if node.op_type == "Cast" and output.endswith(".float32"):
        allowed["to"] = (onnx.TensorProto.FLOAT,)
    if node.op_type == "Reshape":
        allowed["allowzero"] = (0, None)
    if output == "mask.shape":
        allowed |= {"start": (0, None), "end": (None,)}
    return allowed


def _constant_symptoms(weights: Mapping[str, onnx.TensorProto], spec: ModelSpec) -> Iterator[str]:
    expected = dict(_CONSTANTS)
    expected |= {"shape.past": [0, spec.n_kv_heads, 0, spec.head_dim], "shape.heads": [0, -1, spec.head_dim]}
    for n_heads in (spec.n_heads, spec.n_kv_heads):
        expected[f"shape.{n_heads}_heads_joined"] = [0, -1, n_heads * spec.head_dim]
    for layer in range(spec.n_layers):
        n_experts = spec.layer(layer).n_experts
        expected[f"shape.router_of_{n_experts}"] = [-1, n_experts]
    for name, value in expected.items():
        tensor = weights.get(name)
        if tensor is None or tensor.external_data:
            continue
        if tensor.data_type not in _CONSTANT_TYPES:
            yield f"constant {name} is of type number {tensor.data_type}, which no constant of ours has"
            continue
        found, wanted = onnx.numpy_helper.to_array(tensor), np.asarray(value)
        if (
            found.shape != wanted.shape
            or found.dtype.kind not in "biuf"
            or not np.allclose(found.astype(float), wanted.astype(float))
        ):
            yield f"constant {name}: {found.tolist()} in the graph, the model needs {wanted.tolist()}"


def _table_symptoms(
    graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto], folder: Path, spec: ModelSpec
) -> Iterator[str]:
    """Every table of cosines and of sines that a node rotates with."""
    places = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}
    tables: dict[str, bool] = {}  # whether it holds sines
    for node in graph.node:
        for is_sine, place in enumerate(places.get(node.op_type, ())):
            if len(node.input) > place and node.input[place] in weights:
                tables[node.input[place]] = bool(is_sine)
    # where the angles depend on a text's length, nodes choose among tables
    tables |= {name: name == "rotary.sine" for name in ("rotary.cosine", "rotary.sine") if name in weights}
    for name, is_sine in tables.items():
        if len(weights[name].dims) != 2 or weights[name].data_type not in _TABLE_TYPES:
            yield f"table {name} is no matrix of floating point numbers"
            continue
        n_rows = weights[name].dims[0]
        yield from rotary_symptoms(name, _pieces(weights[name], folder), n_rows, spec, is_sine=is_sine)


_WHOLE_NUMBER = onnx.AttributeProto.INT
_CONSTANT_TYPES = (
    *(onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.UINT8),
    onnx.TensorProto.BOOL,
)
_TABLE_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def rotary_symptoms(
    name: str, pieces: Iterator[npt.NDArray[np.floating[Any]]], n_rows: int, spec: ModelSpec, *, is_sine: bool
) -> Iterator[str]:
    """Yields a sentence if a table [positions, head_dim / 2] is not the model's at every position.

    A table for short texts may stand before that for long ones.
    """
    rope, first = spec.rope, 0
    short = rope.switches_after if rope.switches_after is not None and n_rows > rope.switches_after else 0
    of_short, of_long = (rope.inverse_frequencies(n_tokens).double().numpy() for n_tokens in (short, n_rows - short))
    for piece in pieces:
        if piece.shape[1] != len(of_long):
            yield f"table {name} has {piece.shape[1]} columns, the model's head {len(of_long)} pairs"
            return
        rows = np.arange(first, first + len(piece), dtype=np.float64)[:, None]
        angles = np.where(rows < short, rows * of_short, (rows - short) * of_long)
        wanted = rope.attention_factor * (np.sin(angles) if is_sine else np.cos(angles))
        allowed = float(np.finfo(piece.dtype).eps) * 2 + 1e-5 + 4e-7 * angles  # angles are computed in float32
        wrong = ~(np.abs(piece.astype(np.float64) - wanted) <= allowed * max(1.0, rope.attention_factor))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            yield (
                f"rotary table {name}: {float(piece[row, column]):.5f} at position {first + row}, column {column}, the "
                f"model's is {wanted[row, column]:.5f}"
            )
            return
        first += len(piece)


def _pieces(tensor: onnx.TensorProto, folder: Path) -> Iterator[npt.NDArray[np.floating[Any]]]:
    """Rows of a table, some positions at a time."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    n_rows, width = tensor.dims
    if not tensor.external_data:
        yield onnx.numpy_helper.to_array(tensor)
        return
    place = external_place(folder / "model.onnx", tensor)  # of its folder alone
    for first in range(0, n_rows, _POSITIONS_AT_ONCE):
        count = min(_POSITIONS_AT_ONCE, n_rows - first)
        offset = place.offset + first * width * dtype.itemsize
        yield np.fromfile(place.file, dtype, count * width, offset=offset).reshape(count, width)


def _is_same(found: Any, wanted: Any) -> bool:
    if wanted is None:
        return False
    if isinstance(wanted, float) or isinstance(found, float):
        if not isinstance(found, (int, float)) or not isinstance(wanted, (int, float)):
            return False
        return bool(np.float32(found) == np.float32(wanted))
    return bool(found == wanted)


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return repr(value.decode("utf-8", errors="replace"))
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _places(nodes: list[str]) -> str:
    return nodes[0] if len(nodes) == 1 else f"{nodes[0]} and {len(nodes) - 1} more"
