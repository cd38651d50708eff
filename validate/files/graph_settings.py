"""The attributes that an ONNX graph must have to compute what ``config.json`` describes.

A graph keeps its numbers in the attributes of its nodes, in small constants, and in tables of cosines and sines. Those
that every exporter needs are judged in any graph, others only in ours (:mod:`validate.files.own_graph_settings`).
Operators: onnxruntime's ``docs/ContribOperators.md`` and the ONNX specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compressors.model.description.feed_forward import Routed
from compressors.model.description.glu import Activation, Glu
from compressors.model.description.mixers import GroupedQuery, Latent, NoMixer
from compressors.model.description.onnx_cache import Attention, WithStates, cache_heads
from compressors.model.description.roles import Role
from compressors.model.description.routing import Score
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.files.onnx_names import IN_FLOAT32, RELU_ALPHA
from compressors.model.sources.onnx_weights import row_lengths
from validate.files.graph_places import ATTENTION, EXPERTS, Places
from validate.files.own_graph_settings import PRODUCER, AllowedValues, own_attributes, own_constant_symptoms
from validate.files.recurrent_graph_settings import RECURRENT, recurrent_attributes
from validate.files.rotary_tables import table_symptoms

__all__ = ["graph_setting_symptoms"]

_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
_KNOWN = (*ATTENTION, *_NORMS, *EXPERTS, *RECURRENT)  # all their attributes are
_VECTOR_INPUTS: Mapping[str, Mapping[int, Role]] = {
    "GroupQueryAttention": {11: Role.SINKS},
    "MoE": {3: Role.EXPERT_GATE_UP_BIAS, 5: Role.EXPERT_DOWN_BIAS},
    "QMoE": {4: Role.EXPERT_GATE_UP_BIAS, 7: Role.EXPERT_DOWN_BIAS},
}
"""The places of inputs that a node can be without, by operator."""
_HARMLESS = frozenset({"accuracy_level", "stash_type", "chunk_size"})  # they change only the precision


def graph_setting_symptoms(path: Path, spec: ModelSpec) -> list[str]:
    """Lists a graph's attributes, constants and rotary tables that do not fit a model.

    Args:
        path: the ``.onnx`` file, which is readable.
        spec: the model that it should compute.
    """
    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    symptoms: dict[str, list[str]] = {}  # each fault, with its nodes
    places = Places(spec)
    for node, is_inside in _nodes(model.graph):
        layer = places.of(node, is_inside)
        found = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        allowed = _allowed(node, spec, layer, weights)
        if model.producer_name == PRODUCER:
            allowed |= own_attributes(node, spec)
        for name, values in allowed.items():
            if name in found and not any(_is_same(found[name], value) for value in values):
                sentence = (
                    f"{node.op_type} {name}: {_shown(found[name])} in the graph, the model's is {_shown(values[0])}"
                )
                symptoms.setdefault(sentence, []).append(node.output[0])
            elif name not in found and None not in values:
                sentence = f"{node.op_type} {name}: absent in the graph, the model's is {_shown(values[0])}"
                symptoms.setdefault(sentence, []).append(node.output[0])
        for sentence in _input_symptoms(node, spec.layers[layer]):
            symptoms.setdefault(sentence, []).append(node.output[0])
        for name in found.keys() - allowed.keys() - _HARMLESS if node.op_type in _KNOWN else ():
            symptoms.setdefault(f"{node.op_type} {name}: the model has no such setting", []).append(node.output[0])
    found_symptoms = [f"{sentence} ({_places(nodes)})" for sentence, nodes in symptoms.items()]
    if model.producer_name == PRODUCER:
        found_symptoms += own_constant_symptoms(weights, spec)
    found_symptoms += _unknown_mixers(spec)
    return [*found_symptoms, *table_symptoms(model.graph, weights, path.parent, spec)]


def _nodes(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, bool]]:
    """The nodes in the order in which they run, those inside of others too; True: it is inside."""
    for node in graph.node:
        yield node, False
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from ((inner, True) for inner, _ in _nodes(attribute.g))


def _input_symptoms(node: onnx.NodeProto, layer: LayerSpec) -> Iterator[str]:
    """Yields a sentence for each vector of the layer that the node does not take; without one it adds nothing."""
    for place, role in _VECTOR_INPUTS.get(node.op_type, {}).items():
        if role in layer.roles and not _input(node, place):
            yield f"{node.op_type}: the model has {role}, the graph does not use them"


def _unknown_mixers(spec: ModelSpec) -> Iterator[str]:
    for index, layer in enumerate(spec.layers):
        if not isinstance(layer.mixer, Attention | WithStates | NoMixer):
            yield f"layer {index}: {type(layer.mixer).__name__} is no mixer whose attributes can be checked in a graph"


def _allowed(
    node: onnx.NodeProto, spec: ModelSpec, layer: int, weights: Mapping[str, onnx.TensorProto]
) -> AllowedValues:
    """The attributes of an operator that any exporter uses, with the right values."""
    kind = node.op_type
    if kind in _NORMS:
        axis: AllowedValues = {} if kind.startswith("Skip") else {"axis": (-1, None)}
        return axis | {"epsilon": _epsilons(node, spec, weights)}
    if kind in ATTENTION:
        return _attention(node, spec, layer)
    if kind in RECURRENT:
        return recurrent_attributes(node, spec, layer)
    if kind in EXPERTS:
        return _experts(node, spec.layers[layer], weights)
    if kind == "RotaryEmbedding":
        return _rotary_embedding(spec)
    if kind == "MatMulNBits" and _has_axes(weights.get(_input(node, 1)), 3):
        return _quantized_matrix(node, spec, weights)
    if kind == "GatherBlockQuantized":
        return _gathered_rows(node, spec, weights)
    if kind == "FusedMatMul":
        return {"alpha": (1.0, None), "transA": (0, None), "transBatchA": (0, None), "transBatchB": (0, None)}
    return {"axis": (-1, None)} if kind == "Softmax" else {}


def _epsilons(node: onnx.NodeProto, spec: ModelSpec, weights: Mapping[str, onnx.TensorProto]) -> tuple[float, ...]:
    """The model's, or that of the norms inside latent attention, which their lengths tell."""
    scales = next((weights[name] for name in node.input if name in weights), None)
    length = spec.hidden_size if scales is None or not scales.dims else scales.dims[-1]
    mixers = (layer.mixer for layer in spec.layers)
    inner = [
        mixer.inner_epsilon
        for mixer in mixers
        if isinstance(mixer, Latent) and length in (mixer.rank, mixer.query_rank)
    ]
    usual = () if inner and length != spec.hidden_size else (spec.rms_norm_eps,)
    return (*dict.fromkeys(inner), *usual)


def _attention(node: onnx.NodeProto, spec: ModelSpec, layer: int) -> AllowedValues:
    mixer = spec.layers[layer].mixer
    if not isinstance(mixer, Attention):
        return {}
    has_window = mixer.window is not None and mixer.window < spec.context_length
    allowed = _heads(mixer) | {
        "softcap": (0.0, None),
        "smooth_softmax": (0, None),
        "local_window_size": (mixer.window,) if has_window else (-1, mixer.window or -1, None),
        "mask_filter_value": (-10000.0, None),
        "unidirectional": (1, 0, None),
    }
    if node.op_type == "GroupQueryAttention":
        # another exporter may rotate before
        turns = len(node.input) > 7 and bool(node.input[7])
        rope = None if _turns_outside(mixer) else mixer.rope
        allowed["do_rotary"] = (1,) if turns and rope is not None else (0, None)
        allowed["rotary_interleaved"] = (1,) if turns and rope is not None and rope.interleaved else (0, None)
        allowed |= dict.fromkeys(("qk_output", "kv_cache_bit_width"), (0, None))
    else:
        allowed.pop("kv_num_heads")
    return allowed


def _turns_outside(mixer: GroupedQuery | Latent) -> bool:
    """True if the operator must not turn queries and keys, because their norms would come too early."""
    return isinstance(mixer, GroupedQuery) and mixer.turns_before_norms


def _rotary_embedding(spec: ModelSpec) -> AllowedValues:
    """Heads are counted where only a part of each is turned."""
    mixers = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention)]
    counts = {number for mixer in mixers for number in (mixer.n_heads, cache_heads(mixer).number)}
    return {
        "interleaved": (1,) if spec.rope is not None and spec.rope.interleaved else (0, None),
        "scale": (1.0, None),
        "num_heads": (*sorted(counts), 0, None),
        "rotary_embedding_dim": (0 if spec.rope is None else spec.rope.width, 0, None),
        "is_packed_batching": (0, None),
    }


def _heads(mixer: GroupedQuery | Latent) -> AllowedValues:
    """Heads and their scale. Of latent attention a node only caches, in our graphs; in others it has all heads."""
    if isinstance(mixer, Latent):
        heads = dict.fromkeys(("num_heads", "kv_num_heads"), (1, mixer.n_heads))
        return {**heads, "scale": (mixer.scale, 0.0, None)}
    usual_scale = math.isclose(mixer.scale, 1.0 / math.sqrt(mixer.head_dim))
    scale = (mixer.scale, *((0.0, None) if usual_scale else ()))
    return {"num_heads": (mixer.n_heads,), "kv_num_heads": (mixer.n_kv_heads,), "scale": scale}


def _experts(node: onnx.NodeProto, layer: LayerSpec, weights: Mapping[str, onnx.TensorProto]) -> AllowedValues:
    routed = layer.routed
    if routed is None:
        return {"k": (0,)}  # the layer has no experts
    whole = routed.n_experts if layer.bases is None else len(layer.bases.own)
    allowed = _glu(routed.glu) | {
        "k": (min(routed.top_k, whole),),
        "normalize_routing_weights": (1,) if _is_float_beside_bases(node, layer) else _normalization(node, routed),
        "swiglu_fusion": (1, 2),
        "use_sparse_mixer": (0, None),
    }
    if node.op_type == "QMoE" and _has_axes(weights.get(_input(node, 2)), 3):
        codes = weights[_input(node, 2)].dims
        allowed |= {
            "expert_weight_bits": (8 * codes[-1] // layer.expert_size, None),
            "weights_prepacked": (0, -1, None),
            "quant_type": (b"int", None),
        }
        allowed |= _block_size(node, weights, 3, layer.expert_size)
    return allowed


def _is_float_beside_bases(node: onnx.NodeProto, layer: LayerSpec) -> bool:
    """True for the operator without an input for weights: a node multiplies its outputs by the sum of the weights."""
    return layer.bases is not None and node.op_type == "MoE"


def _normalization(node: onnx.NodeProto, routed: Routed) -> tuple[Any, ...]:
    """The right values of normalize_routing_weights; experts that nodes chose get logits whose weights add up to 1."""
    has_gates = len(node.input) > 14 and bool(node.input[14])  # with given gates the attribute does not matter
    routing = routed.routing
    chooses_by_logits = not routing.has_selection_bias and routing.n_groups == 1 and routing.score is not Score.SIGMOID
    normalizes = int(routing.normalizes or routing.score is Score.LOGITS or not chooses_by_logits)
    return (normalizes, *((0, 1, None) if has_gates else () if normalizes else (None,)))


def _glu(glu: Glu) -> AllowedValues:
    """The right values for the function; an activation that the operators lack matches no attribute's value."""
    is_relu_squared = not glu.is_gated and glu.activation is Activation.RELU_SQUARED
    is_swiglu = is_relu_squared or (glu.is_gated and glu.activation is Activation.SILU)
    return {
        "activation_type": (b"swiglu", b"silu") if is_swiglu else (glu.activation.encode(),),
        "activation_alpha": (RELU_ALPHA if is_relu_squared else glu.alpha,),
        "activation_beta": (glu.offset, *(() if glu.offset else (None,))),
        "swiglu_limit": (math.inf, None) if glu.limit is None else (glu.limit,),
    }


def _quantized_matrix(node: onnx.NodeProto, spec: ModelSpec, weights: Mapping[str, onnx.TensorProto]) -> AllowedValues:
    """The right values for a matrix of codes [N, blocks, bytes of a block]; K is one of the model's widths."""
    rows, blocks, block_bytes = weights[node.input[1]].dims
    numbers = {attribute.name: attribute.i for attribute in node.attribute if attribute.type == _WHOLE_NUMBER}
    widths = _row_lengths(spec)
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


def _row_lengths(spec: ModelSpec) -> tuple[int, ...]:
    """The lengths of the rows of all matrices, the hidden size first."""
    lengths = (
        length
        for layer in spec.written.layers
        for tensor in layer.tensors
        if tensor.is_quantizable
        for length in row_lengths(tensor, layer)
    )
    return tuple(dict.fromkeys((spec.hidden_size, *lengths)))


def _gathered_rows(node: onnx.NodeProto, spec: ModelSpec, weights: Mapping[str, onnx.TensorProto]) -> AllowedValues:
    """The right values for rows of the embedding, or of the adapters of experts, whose rows have several lengths."""
    codes = weights.get(_input(node, 0))
    allowed: AllowedValues = {"gather_axis": (0, None), "quantize_axis": (1, -1)}
    if codes is None or not codes.dims:
        return allowed | {"bits": (None,)} | _block_size(node, weights, 2, spec.hidden_size)
    length = spec.hidden_size
    if _has_axes(codes, _ADAPTER_AXES):
        allowed["quantize_axis"] = (_ADAPTER_AXES - 1, -1)
        bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 4)
        length = next((each for each in _row_lengths(spec) if each * bits == 8 * codes.dims[-1]), length)
    return allowed | {"bits": (8 * codes.dims[-1] // length, None)} | _block_size(node, weights, 2, length)


_ADAPTER_AXES = 4


def _block_size(
    node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto], scales_input: int, columns: int
) -> AllowedValues:
    """The block size that follows from the scales' shape; scales may be cast before they are used."""
    name = _input(node, scales_input).removesuffix(IN_FLOAT32)
    if name not in weights or len(weights[name].dims) < 2 or columns % max(1, weights[name].dims[-1]):
        return {}
    return {"block_size": (columns // max(1, weights[name].dims[-1]),)}


def _input(node: onnx.NodeProto, place: int) -> str:
    """The name of an input; empty if the node has no such input."""
    return str(node.input[place]) if place < len(node.input) else ""


def _has_axes(weight: onnx.TensorProto | None, number: int) -> bool:
    return weight is not None and len(weight.dims) == number


_WHOLE_NUMBER = onnx.AttributeProto.INT


def _is_same(found: Any, wanted: Any) -> bool:
    if wanted is None:
        return False
    if isinstance(found, onnx.TensorProto):
        if found.data_type == onnx.TensorProto.UNDEFINED:
            return False
        return bool((onnx.numpy_helper.to_array(found) == np.float32(wanted)).all())
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
