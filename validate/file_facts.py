"""What a file says about its model before anything runs: sizes, bits per weight, and the base of its rotary embedding.

A GGUF file says it in metadata and tensor directory. An ONNX graph has no metadata: its MoE operators tell of experts,
its caches of layers, and the cosine table of its attention of the rotary base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has none
from onnx import external_data_helper

from compressors.model.errors import InputError
from compressors.model.gguf_file import GgufEntry, GgufFile

__all__ = ["FileFacts", "gguf_facts", "onnx_facts"]


@dataclass(frozen=True)
class FileFacts:
    """None is what a file does not say."""

    bits_per_weight: float  # of the experts; of all matrices if there are none
    n_layers: int | None
    n_experts: int | None  # of the layer with the most; None of a dense model, and of experts that are plain matrices
    top_k: int | None
    rope_base: float | None
    rms_norm_eps: float | None
    vocab_size: int | None  # with padding


def gguf_facts(path: Path) -> FileFacts:
    """Reads a GGUF file's header.

    Raises:
        InputError: the file is missing, truncated or not GGUF.
    """
    file = GgufFile(path)
    matrices = [entry for entry in file.tensors.values() if len(entry.shape) > 1]
    experts = [entry for entry in matrices if len(entry.shape) == 3]
    architecture = file.metadata.get("general.architecture", "")

    def number(key: str) -> Any:
        value = file.metadata.get(f"{architecture}.{key}")
        return value if isinstance(value, (int, float)) else None

    return FileFacts(
        bits_per_weight=_bits_per_weight(experts or matrices),
        n_layers=number("block_count"),
        n_experts=number("expert_count") or None,
        top_k=number("expert_used_count") or None,
        rope_base=number("rope.freq_base") or _LLAMA_CPP_ROPE_BASE,
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        vocab_size=file.array_lengths.get("tokenizer.ggml.tokens"),
    )


_LLAMA_CPP_ROPE_BASE = 10000.0  # where the file says nothing (src/llama-model.cpp)


def _bits_per_weight(entries: Sequence[GgufEntry]) -> float:
    n_values = sum(math.prod(entry.shape) for entry in entries)
    return 8 * sum(entry.n_bytes for entry in entries) / max(1, n_values)


def onnx_facts(path: Path) -> FileFacts:
    """Reads an ONNX graph, and of its weights one row of the cosine table.

    Args:
        path: the ``.onnx`` file.

    Raises:
        InputError: the file is missing or no ONNX graph.
    """
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise InputError(f"{path} is no readable ONNX graph ({error}); export it again") from None
    weights = {tensor.name: tensor for tensor in graph.initializer}
    moe = [node for node in graph.node if node.op_type in ("MoE", "QMoE")]
    caches = [value for value in graph.input if value.name.startswith("past_key_values.")]
    return FileFacts(
        bits_per_weight=_operator_bits(graph, weights),
        n_layers=len(caches) // 2,
        n_experts=max((weights[node.input[2]].dims[0] for node in moe if node.input[2] in weights), default=None),
        top_k=max((_attributes(node).get("k", 1) for node in moe), default=None),
        rope_base=_rope_base(graph, weights, path.parent),
        rms_norm_eps=None,
        vocab_size=next((_last_dimension(value) for value in graph.output if value.name == "logits"), None),
    )


def _last_dimension(value: onnx.ValueInfoProto) -> int | None:
    dimensions = value.type.tensor_type.shape.dim
    return (dimensions[-1].dim_value or None) if dimensions else None


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _operator_bits(graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto]) -> float:
    """Bits of one weight, scales included, in the operators that hold most: experts, else quantized linear layers."""
    for kind, bits_name in (("QMoE", "expert_weight_bits"), ("MoE", ""), ("MatMulNBits", "bits")):
        nodes = [node for node in graph.node if node.op_type == kind]
        if not nodes:
            continue
        attributes = _attributes(nodes[0])
        if not bits_name:
            return _bits_of_type(weights[nodes[0].input[2]]) if nodes[0].input[2] in weights else 32.0
        block_size = attributes.get("block_size", 0)
        return float(attributes.get(bits_name, 4)) + (16 / block_size if block_size > 0 else 0.0)
    return _bits_of_type(max(weights.values(), key=lambda tensor: math.prod(tensor.dims))) if weights else 32.0


def _bits_of_type(tensor: onnx.TensorProto) -> float:
    return 8.0 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _rope_base(graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto], folder: Path) -> float | None:
    """From position 1 of the cosine table [positions, half]: its angle in column i is base^(-i / half)."""
    tables = [node.input[7] for node in graph.node if node.op_type == "GroupQueryAttention" and len(node.input) > 7]
    table = next((weights[name] for name in tables if name in weights), None)
    if table is None or len(table.dims) != 2 or table.dims[0] < 2 or table.dims[1] < 2:
        return None
    half, dtype = table.dims[1], onnx.helper.tensor_dtype_to_np_dtype(table.data_type)
    row = _stored_row(table, folder, half, dtype) if table.external_data else onnx.numpy_helper.to_array(table)[1]
    column = 1  # column 0 is 1 whatever the base; angles further on are small, where a cosine says little
    angle = math.acos(min(1.0, max(-1.0, float(row[column]))))
    return angle ** -(half / column) if angle > 0 else None


def _stored_row(table: onnx.TensorProto, folder: Path, width: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Row 1 of a table [rows, width] that lies in another file."""
    place = external_data_helper.ExternalDataInfo(table)
    path = folder / place.location
    inside = not Path(place.location).is_absolute() and ".." not in Path(place.location).parts
    if not inside or not path.is_file():
        raise InputError(f"{path}, which should hold the weights of the graph, is no file of its folder; put it there")
    row = np.fromfile(path, dtype, width, offset=(place.offset or 0) + width * dtype.itemsize)
    if len(row) < width:
        raise InputError(f"{path} is truncated: tensor {table.name} ends after the file does; export it again")
    return row
