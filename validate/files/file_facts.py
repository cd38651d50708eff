"""Facts that a file gives about its model before anything runs: sizes, bits per weight, rotary base.

A GGUF file has them in metadata and tensor directory. An ONNX graph has no metadata: its MoE operators give the
experts, its caches the layers, and the cosine table of its attention the rotary base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from compressors.model.files.gguf.gguf_file import GgufEntry, GgufFile
from compressors.model.files.onnx_graph import external_place, read_graph
from compressors.model.files.onnx_names import BY_EXPERT, CHOSEN_LOGITS, WEIGHTS_OF_ALL, is_cache_input
from compressors.model.files.raw_file import RawFile

__all__ = ["FileFacts", "gguf_facts", "onnx_facts"]


@dataclass(frozen=True)
class FileFacts:
    """The facts that a file gives; None where it gives none."""

    bits_per_weight: float  # of the experts, or of all matrices if there are none
    n_layers: int | None  # decoder layers
    n_experts: int | None  # in the layer with the most; None for a dense model, and for experts as plain matrices
    top_k: int | None
    rope_base: float | None
    rms_norm_eps: float | None
    vocab_size: int | None  # with padding
    n_mtp: int = 0  # layers behind the decoder layers, which predict further tokens


def gguf_facts(path: Path) -> FileFacts:
    """Reads a GGUF file's header.

    Raises:
        InputError: the file is missing, truncated or not GGUF.
    """
    file = GgufFile(path)
    matrices = [entry for entry in file.tensors.values() if len(entry.shape) > 1]
    architecture = file.metadata.get("general.architecture", "")

    def number(key: str) -> float | None:
        value = file.metadata.get(f"{architecture}.{key}")
        return value if isinstance(value, (int, float)) else None

    def count(key: str) -> int | None:
        value = number(key)
        return value if type(value) is int else None

    n_experts, n_layers, n_mtp = count("expert_count"), count("block_count"), count("nextn_predict_layers") or 0
    experts = [entry for entry in matrices if len(entry.shape) == 3 and entry.shape[0] == n_experts]
    return FileFacts(
        bits_per_weight=_bits_per_weight(experts or matrices),
        n_layers=None if n_layers is None else max(0, n_layers - n_mtp),
        n_mtp=n_mtp,
        n_experts=n_experts or None,
        top_k=count("expert_used_count") or None,
        rope_base=number("rope.freq_base") or _LLAMA_CPP_ROPE_BASE,
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        vocab_size=file.array_lengths.get("tokenizer.ggml.tokens"),
    )


_LLAMA_CPP_ROPE_BASE = 10000.0  # the default if the file says nothing (src/llama-model.cpp)


def _bits_per_weight(entries: Sequence[GgufEntry]) -> float:
    n_values = sum(math.prod(entry.shape) for entry in entries)
    return 8 * sum(entry.n_bytes for entry in entries) / max(1, n_values)


def onnx_facts(path: Path) -> FileFacts:
    """Reads an ONNX graph, and one row of its cosine table.

    Args:
        path: the ``.onnx`` file.

    Raises:
        InputError: the file is missing or not an ONNX graph.
    """
    graph = read_graph(path)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    moe = [node for node in graph.node if node.op_type in ("MoE", "QMoE")]
    counts = [tensor.dims[0] for tensor in _inputs(moe, 2, weights) if tensor.dims]
    counts += [
        len(node.input) for node in _all_nodes(graph) if node.op_type == "Concat" and BY_EXPERT in node.output[0]
    ]
    chosen = [_number(node, "k", 1) for node in moe] + list(_chosen(graph, weights))
    counts_beside_bases, chosen_beside_bases = _beside_bases(graph, weights)
    counts, chosen = counts + counts_beside_bases, chosen + chosen_beside_bases
    caches = [value for value in graph.input if is_cache_input(value.name)]
    return FileFacts(
        bits_per_weight=_operator_bits(graph, weights),
        n_layers=len(caches) // 2,
        n_experts=max(counts, default=None),
        top_k=max(chosen, default=None),
        rope_base=_rope_base(graph, weights, path),
        rms_norm_eps=None,
        vocab_size=next((_last_dimension(value) for value in graph.output if value.name == "logits"), None),
    )


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yields the nodes of a graph, and those of the graphs inside of them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _all_nodes(attribute.g)


def _chosen(graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto]) -> Iterator[int]:
    """Yields the number of experts of a token where nodes compute them."""
    nodes = [node for node in graph.node if node.output[0].endswith(f".{CHOSEN_LOGITS}")]
    yield from _last_numbers(nodes, weights)


def _beside_bases(graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto]) -> tuple[list[int], list[int]]:
    """The numbers of experts, and of those of a token, in layers of our graphs in which some stand on bases.

    The weights of all experts are made from logits that were scattered where experts were chosen.
    """
    makers = {output: node for node in graph.node for output in node.output}

    def behind(nodes: Iterable[onnx.NodeProto], place: int, operator: str) -> list[onnx.NodeProto]:
        found = (makers.get(node.input[place]) for node in nodes if len(node.input) > place)
        return [node for node in found if node is not None and node.op_type == operator]

    shaped = behind((node for node in graph.node if node.output[0].endswith(f".{WEIGHTS_OF_ALL}")), 0, "Reshape")
    choosers = behind(behind(shaped, 0, "ScatterElements"), 1, "TopK")
    return list(_last_numbers(shaped, weights)), list(_last_numbers(choosers, weights))


def _last_numbers(nodes: Iterable[onnx.NodeProto], weights: Mapping[str, onnx.TensorProto]) -> Iterator[int]:
    """Yields the last number of the constant that is each node's second input."""
    for constant in _inputs(nodes, 1, weights):
        if not constant.external_data and math.prod(constant.dims):
            yield int(onnx.numpy_helper.to_array(constant).reshape(-1)[-1])


def _last_dimension(value: onnx.ValueInfoProto) -> int | None:
    dimensions = value.type.tensor_type.shape.dim
    return (dimensions[-1].dim_value or None) if dimensions else None


def _number(node: onnx.NodeProto, name: str, default: int) -> int:
    """A whole number among the node's attributes; the default if it is absent or something else."""
    kind = onnx.AttributeProto.INT
    return next((int(entry.i) for entry in node.attribute if entry.name == name and entry.type == kind), default)


def _inputs(
    nodes: Iterable[onnx.NodeProto], place: int, weights: Mapping[str, onnx.TensorProto]
) -> Iterator[onnx.TensorProto]:
    """The weights that these nodes take at a place of their inputs."""
    names = (node.input[place] for node in nodes if len(node.input) > place)
    return (weights[name] for name in names if name in weights)


def _operator_bits(graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto]) -> float:
    """Mean bits of a weight, scales included, in the largest operators: experts, else quantized linears."""
    for kinds in (("QMoE", "MoE"), ("MatMulNBits",)):
        nodes = [node for node in _all_nodes(graph) if node.op_type in kinds]
        found = [(_node_bits(node, weights), _node_values(node, weights)) for node in nodes]
        if found:
            n_values = sum(of_node for _, of_node in found)
            return sum(bits * of_node for bits, of_node in found) / n_values
    return _bits_of_type(max(weights.values(), key=lambda tensor: math.prod(tensor.dims))) if weights else 32.0


_BITS_NAMES = {"QMoE": "expert_weight_bits", "MatMulNBits": "bits"}


def _node_bits(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> float:
    if node.op_type not in _BITS_NAMES:
        return max(map(_bits_of_type, _inputs([node], 2, weights)), default=32.0)
    block_size = _number(node, "block_size", 0)
    return _number(node, _BITS_NAMES[node.op_type], 4) + (16 / block_size if block_size > 0 else 0.0)


def _node_values(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> float:
    """The number of values in the node's first weight, packed or not."""
    codes = next(_inputs([node], 1 if node.op_type == "MatMulNBits" else 2, weights), None)
    if codes is None:
        return 1.0
    bits = _number(node, _BITS_NAMES[node.op_type], 4) if node.op_type in _BITS_NAMES else 8
    return max(1.0, float(math.prod(codes.dims)) * 8 / max(1, bits))


def _bits_of_type(tensor: onnx.TensorProto) -> float:
    dtype = _numpy_dtype(tensor)
    return 32.0 if dtype is None else 8.0 * dtype.itemsize


def _numpy_dtype(tensor: onnx.TensorProto) -> np.dtype[Any] | None:
    """The type in NumPy; None if NumPy, or ONNX, has no such type."""
    known = tensor.data_type in TensorProto.DataType.values() and tensor.data_type != TensorProto.UNDEFINED
    return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) if known else None


def _rope_base(graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto], graph_file: Path) -> float | None:
    """The base, from position 1 of the cosine table [positions, half], with angles base^(-i / half) in columns i."""
    attention = (node for node in graph.node if node.op_type == "GroupQueryAttention")
    table = next(_inputs(attention, 7, weights), None)
    if table is None or len(table.dims) != 2 or table.dims[0] < 2 or table.dims[1] < 2:
        return None
    half, column = table.dims[1], 1  # column 0 is 1 for every base; angles further on are small and say little
    cosine = _value(table, half + column, graph_file)
    if cosine is None:
        return None
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    return _power(angle, -(half / column)) if angle > 0 else None


def _power(base: float, exponent: float) -> float | None:
    try:
        return float(base**exponent)
    except OverflowError:
        return None


def _value(tensor: onnx.TensorProto, index: int, graph_file: Path) -> float | None:
    """One value of a floating point tensor by its flat index; None if it is missing or not a number."""
    dtype = _numpy_dtype(tensor)
    if dtype is None or dtype.kind != "f":
        return None
    if tensor.external_data:
        place = external_place(graph_file, tensor)
        file, start = RawFile(place.file), place.offset + index * dtype.itemsize
        data = file.start(dtype.itemsize, start) if start < file.size else b""
    elif tensor.raw_data:
        data = tensor.raw_data[index * dtype.itemsize : (index + 1) * dtype.itemsize]
    else:
        return float(tensor.float_data[index]) if index < len(tensor.float_data) else None
    if len(data) < dtype.itemsize:
        return None
    value = float(np.frombuffer(data, dtype)[0])
    return value if math.isfinite(value) else None
