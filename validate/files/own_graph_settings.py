"""The attributes and constants of our own ONNX graphs whose purpose only their names tell.

They belong to the nodes that prepare masks and shapes, to those that route where the MoE operators cannot, and to those
around the operators of recurrent mixers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from compressors.model.description.mixers import GatedDelta, GroupedQuery, Latent, Mamba2, Mixer
from compressors.model.description.onnx_cache import Attention, WithStates, cache_heads
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.files.onnx_names import (
    BY_EXPERT,
    EMBEDDING_FACTOR,
    HEAD_FACTOR,
    IN_FLOAT32,
    JOINED,
    LOGIT_CAP,
    LOGITS,
    NOT_CHOSEN,
    NUM_LOGITS_TO_KEEP,
    RESIDUAL_FACTOR,
    ROUTER_FACTOR,
    ROUTING,
)
from validate.files.shared_base_settings import attributes_beside_bases, constants_of_bases

__all__ = ["PRODUCER", "AllowedValues", "own_attributes", "own_constant_symptoms"]

PRODUCER = "moe-export"
"""``producer_name`` of our graphs."""

AllowedValues = dict[str, tuple[Any, ...]]
"""The right values of attributes, by name; with None among them, the attribute may be absent."""

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
    ("recurrent.mask.float32", "to"): onnx.TensorProto.FLOAT,
    **{(name, "keepdims"): 1 for name in ("tokens.end", "recurrent.last")},
    **{(name, "noop_with_empty_axes"): 0 for name in ("tokens.end", "recurrent.last")},
    ("wanted.residual", "batch_dims"): 1,
    ("wanted.branch", "batch_dims"): 1,
}
"""Attributes of our graphs' nodes that feed the others, by the node's first output; ``recurrent.last`` is that of older
graphs, which made logits at all positions."""

_ROUTING: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "TopK": {"axis": (-1, None), "largest": (1, None), "sorted": (1, None)},
    "GatherElements": {"axis": (-1,)},
    "ScatterElements": {"axis": (-1,), "reduction": (b"none", None)},
    "LogSoftmax": {"axis": (-1, None)},
}
"""Attributes of the nodes with which our graphs route where the MoE operators cannot, by operator."""
_FILLED = {"shut": -math.inf, "open": 0.0}
"""The numbers that fill such nodes' values, by the end of the values' names."""

_DELTA = "delta"
"""Follows the layer in the names of a gated delta rule's values."""
_MAMBA = "mamba"
"""The same of Mamba-2."""
_SHORT = "short"
"""The same of a short convolution."""

_SHARED = ("shared", "shared.ungated")
"""The names of a shared expert's values, behind the layer's."""

_CONSTANTS: Mapping[str, Any] = {
    "zero": 0,
    "one": 1,
    "bases.nothing": 0,
    "axis.0": [0],
    "axis.1": [1],
    "axis.2": [2],
    "axes.1_2": [1, 2],
    "ones": [1],
    "bias.removed": -1e9,
    "bias.kept": 0,
    "true": True,
    "norm.one": 1,
    NUM_LOGITS_TO_KEEP: 1,
}

_CONSTANT_TYPES = (
    *(onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.UINT8),
    onnx.TensorProto.BOOL,
)


def own_attributes(node: onnx.NodeProto, spec: ModelSpec) -> AllowedValues:
    """The values allowed for a node that only the names in our own graphs identify."""
    output = node.output[0]
    allowed: AllowedValues = {name: (value,) for (place, name), value in _PREPARATION.items() if place == output}
    for name in ("select_last_index", "noop_with_empty_axes"):
        if name in allowed:
            allowed[name] = (0, None)
    if node.op_type == "Gather" and output == "embedding":
        allowed["axis"] = (0, None)
    if node.op_type == "GatherBlockQuantized":
        allowed.pop("axis", None)
    if node.op_type == "FusedMatMul":
        allowed["transB"] = (1,)
    if node.op_type == "Cast" and output.endswith(IN_FLOAT32):
        allowed["to"] = (onnx.TensorProto.FLOAT,)
    if node.op_type == "Reshape":
        allowed["allowzero"] = (0, None)
    if output == "mask.shape":
        allowed |= {"start": (0, None), "end": (None,)}
    of_mixers = _of_latent_attention(node, spec) | _of_convolution(node, spec) | _of_state(node, spec)
    return allowed | _of_our_routing(node) | of_mixers | attributes_beside_bases(node)


def _of_latent_attention(node: onnx.NodeProto, spec: ModelSpec) -> AllowedValues:
    output = node.output[0]
    if output.endswith(BY_EXPERT) or (node.op_type == "Split" and BY_EXPERT in "".join(node.output)):
        return {"axis": (0,)}
    if node.op_type == "Split" or (node.op_type == "Concat" and output.endswith(JOINED)):
        return {"axis": (-1,)}
    if node.op_type == "FusedMatMul" and output.endswith(LOGITS):
        return {"alpha": (_scale(output, spec),)}
    return {}


def _scale(output: str, spec: ModelSpec) -> float | None:
    """The scale of latent attention in the layer whose value it is; None: the layer has none."""
    mixer = _mixer(output, spec)
    return mixer.scale if isinstance(mixer, Latent) else None


def _mixer(output: str, spec: ModelSpec) -> Mixer | None:
    """The mixer of the layer whose value it is; None: the model has no such layer."""
    index = [*output.split("."), ""][1]
    return spec.layers[int(index)].mixer if index.isdigit() and int(index) < spec.n_layers else None


def _of_convolution(node: onnx.NodeProto, spec: ModelSpec) -> AllowedValues:
    if not isinstance(_mixer(node.output[0], spec), WithStates):
        return {}
    if node.op_type == "Concat" and node.output[0].endswith(".inputs.seen"):
        return {"axis": (1,)}
    of_operators: Mapping[str, AllowedValues] = {
        "Transpose": {"perm": ([0, 2, 1],)},
        "GatherND": {"batch_dims": (1,)},
        "CausalConvWithState": {"channels_last": (1,)},
    }
    return of_operators.get(node.op_type, {})


def _of_state(node: onnx.NodeProto, spec: ModelSpec) -> AllowedValues:
    output, mixer = node.output[0], _mixer(node.output[0], spec)
    if not isinstance(mixer, (GatedDelta, Mamba2)):
        return {}
    n_queries, scale = (mixer.n_groups, 1.0) if isinstance(mixer, Mamba2) else (mixer.n_key_heads, mixer.scale)
    of_operators: Mapping[str, AllowedValues] = {
        "Gather": {"axis": (2,)},
        "LinearAttention": {"q_num_heads": (n_queries,), "scale": (scale,)},
    }
    if node.op_type == "RMSNormalization" and isinstance(mixer, GatedDelta) and output.endswith(".of_length_1"):
        return {"axis": (-1,), "epsilon": (mixer.key_epsilon / mixer.key_dim,)}
    return of_operators.get(node.op_type, {})


def _of_our_routing(node: onnx.NodeProto) -> AllowedValues:
    _, routing, name = node.output[0].partition(f".{ROUTING}.")
    if not routing:
        return {}
    allowed: AllowedValues = dict(_ROUTING.get(node.op_type, {}))
    if node.op_type == "ReduceSum":
        allowed |= {"keepdims": (int(name == "total"),), "noop_with_empty_axes": (0, None)}
    if node.op_type == "ConstantOfShape" and name in _FILLED:
        allowed["value"] = (_FILLED[name],)
    return allowed


def own_constant_symptoms(weights: Mapping[str, onnx.TensorProto], spec: ModelSpec) -> Iterator[str]:
    """Lists the constants of a graph that are not those of the model.

    Constants of one name and several values, in a model of different layers, have a number behind the name.
    """
    expected: dict[str, list[Any]] = {name: [value] for name, value in _CONSTANTS.items()}
    of_layers = (item for layer in spec.written.layers for item in _constants_of(layer).items())
    for name, value in (*_factors(spec), *of_layers):
        expected.setdefault(name, []).append(value)
    for name, value in {name: value for name, value in _factors(spec) if value != 1.0}.items():
        if name not in weights:
            yield f"constant {name}: absent in the graph, the model needs {value:g}"
    for name, tensor in weights.items():
        stem, _, number = name.rpartition(".")
        values = expected.get(name, expected.get(stem, []) if number.isdigit() else [])
        if not values or tensor.external_data:
            continue
        if tensor.data_type not in _CONSTANT_TYPES:
            yield f"constant {name} is of type number {tensor.data_type}, which no constant of ours has"
            continue
        found, wanted = onnx.numpy_helper.to_array(tensor), [np.asarray(value) for value in values]
        if found.dtype.kind not in "biuf" or not any(_is_equal(found, value) for value in wanted):
            yield f"constant {name}: {found.tolist()} in the graph, the model needs {wanted[0].tolist()}"


def _factors(spec: ModelSpec) -> Iterator[tuple[str, float]]:
    """The factors of the model; without a constant of that name nothing is multiplied."""
    yield EMBEDDING_FACTOR, spec.embedding_scale
    yield HEAD_FACTOR, 1 / spec.logit_divisor
    yield LOGIT_CAP, 1.0 if spec.logit_cap is None else spec.logit_cap
    if any(layer.routed is not None and layer.routed.router_has_norm for layer in spec.written.layers):
        yield ROUTER_FACTOR, spec.hidden_size**-0.5
    yield from ((RESIDUAL_FACTOR, layer.residual_scale) for layer in spec.written.layers)


def _is_equal(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> bool:
    return found.shape == wanted.shape and bool(np.allclose(found.astype(float), wanted.astype(float)))


def _constants_of(layer: LayerSpec) -> Mapping[str, Any]:
    """The constants that a layer's nodes use, if they are there."""
    return _constants_of_mixer(layer.mixer) | _constants_of_glu(layer) | _constants_of_routing(layer)


def _constants_of_mixer(mixer: Mixer) -> dict[str, Any]:
    if isinstance(mixer, WithStates):
        numbers = [[number] for number in range(mixer.kernel - 1)]
        return {f"convolution.last_{mixer.kernel - 1}": numbers} | _constants_of_states(mixer)
    return _constants_of_attention(mixer) if isinstance(mixer, Attention) else {}


def _constants_of_states(mixer: WithStates) -> dict[str, Any]:
    if isinstance(mixer, GatedDelta):
        return _constants_of_gated_delta(mixer)
    if isinstance(mixer, Mamba2):
        return _constants_of_mamba2(mixer)
    return {f"split.{_SHORT}.projected.parts": [mixer.channels] * 3}


def _constants_of_attention(mixer: GroupedQuery | Latent) -> dict[str, Any]:
    heads = cache_heads(mixer)
    past = {"shape.past": [0, heads.number, 0, heads.width]}
    if isinstance(mixer, Latent):
        return past | _constants_of_latent(mixer)
    joined = {f"shape.{count}_heads_joined": [0, -1, count * heads.width] for count in (mixer.n_heads, heads.number)}
    gated = {"shape.gated_heads": [0, -1, 2 * heads.width], "split.query.gated.heads.halves": [heads.width] * 2}
    return past | joined | gated | {"shape.heads": [0, -1, heads.width]}


def _constants_of_latent(mixer: Latent) -> dict[str, Any]:
    n_heads, width, half = mixer.n_heads, mixer.cached_values, cache_heads(mixer).width
    return {
        "split.query.heads": [mixer.plain_dim, mixer.rotary_dim] * n_heads,
        "split.attended.step.heads.halves": [half, half],
        "split.key_value_a.parts": [mixer.rank, mixer.rotary_dim],
        "split.vector.joined.turned.halves": [half, half],
        "split.attended.heads": [mixer.rotary_dim, mixer.rank] * n_heads,
        "shape.heads_apart": [0, 1, n_heads, width],
        "shape.heads_together": [0, 1, n_heads * width],
    }


def _constants_of_gated_delta(mixer: GatedDelta) -> dict[str, Any]:
    n_heads, width = mixer.n_key_heads, mixer.key_dim
    values_each, heads_each = mixer.width // n_heads, mixer.n_value_heads // n_heads
    keys = n_heads * width
    return {
        "shape.by_key_head": [0, 0, n_heads, -1],
        "shape.side_by_side": [0, 0, -1],
        f"{_DELTA}.unit_scales": [width**-0.5] * width,
        f"{_DELTA}.key_of_value_head": [head for head in range(n_heads) for _ in range(heads_each)],
        f"split.{_DELTA}.convolved.parts": [keys, keys, mixer.width],
        f"split.{_DELTA}.projected.grouped.parts": [width, width, values_each, values_each],
        f"split.{_DELTA}.strength_and_decay.grouped.parts": [heads_each, heads_each],
    }


def _constants_of_mamba2(mixer: Mamba2) -> dict[str, Any]:
    of_keys, heads_each = mixer.n_groups * mixer.key_dim, mixer.n_heads // mixer.n_groups
    return {
        "axis.last": [-1],
        "shape.by_group": [0, 0, mixer.n_groups, -1],
        "shape.by_head": [0, 0, mixer.n_heads, -1],
        "shape.side_by_side": [0, 0, -1],
        f"{_MAMBA}.group_of_head": [group for group in range(mixer.n_groups) for _ in range(heads_each)],
        f"{_MAMBA}.unit_scales": [1.0] * (mixer.width // mixer.n_groups),
        f"split.{_MAMBA}.projected.parts": [mixer.width, mixer.channels, mixer.n_heads],
        f"split.{_MAMBA}.convolved.parts": [mixer.width, of_keys, of_keys],
    }


def _constants_of_glu(layer: LayerSpec) -> dict[str, Any]:
    if layer.feed_forward is None:
        return {}
    glu = layer.feed_forward.glu
    limits = {} if glu.limit is None else {"glu.low": -glu.limit, "glu.high": glu.limit}
    shared = None if layer.routed is None else layer.routed.shared
    halves = {} if shared is None else {f"split.{name}.gate_up.parts": [shared.width] * 2 for name in _SHARED}
    return limits | halves | constants_of_bases(layer) | {"glu.alpha": glu.alpha, "glu.offset": glu.offset}


def _constants_of_routing(layer: LayerSpec) -> dict[str, Any]:
    if layer.routed is None:
        return {}
    routing, n_experts = layer.routed.routing, layer.routed.n_experts
    counts = {f"best_{number}": [number] for number in (1, 2, layer.routed.top_k, routing.n_chosen_groups)}
    return counts | {
        f"shape.router_of_{n_experts}": [-1, n_experts],
        f"shape.of_{n_experts}_experts": [0, 0, -1],
        "shape.groups": [0, 0, routing.n_groups, n_experts // routing.n_groups],
        "axis.last": [-1],
        "routing.scale": routing.scale,
        "routing.not_chosen": NOT_CHOSEN,
        "routing.epsilon": routing.epsilon,
        "routing.least_sum": routing.least_sum,
    }
