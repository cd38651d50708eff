"""Reads, and on demand feeds, the routers inside llama.cpp's running graph.

The scheduler (``ggml_backend_sched_compute_splits`` in ``ggml/src/ggml-backend.cpp``) asks the evaluation callback
about every node before it runs. It cuts the graph behind each node that the callback accepts, computes the piece, waits
for the device, and calls again: now the node's values are there, and the rest of the graph reads what is written to it.

The cuts also keep fused GPU kernels away. For softmax, sort, selection and weights of a MoE layer CUDA, Metal and
Vulkan have one kernel that leaves what lies in between unwritten (``ggml_cuda_topk_moe_fusion``,
``ggml_metal_fusion_check_topk_moe``, ``ggml_vk_can_fuse_topk_moe``). They match its pattern inside the piece that they
are given only (``ggml_can_fuse_subgraph_ext`` in ``ggml/src/ggml.c`` refuses nodes behind its end), and because the
chosen experts, in the middle of the pattern, are accepted here, no piece holds all of it. If the callback accepted only
later nodes and followed their sources, it would read memory that was never written.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt
from llama_cpp import _ggml

from compressors.model.errors import InputError
from compressors.model.predictions.routing_record import NO_EXPERT, RoutingRecord, selection_margins
from validate.routing.router_inputs import RouterInputs

__all__ = ["RoutingCollector", "ggml_function", "node_name", "node_values"]


class _TensorHead(ctypes.Structure):
    """The beginning of ``struct ggml_tensor`` (``ggml/include/ggml.h``), up to its name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("lengths", ctypes.c_int64 * 4),
        ("strides", ctypes.c_size_t * 4),
        ("operation", ctypes.c_int),
        ("operation_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("sources", ctypes.c_void_p * 10),
        ("view_source", ctypes.c_void_p),
        ("view_offset", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


# names that build_moe_ffn (src/llama-graph.cpp) and the models' graphs (src/models) give to a layer's nodes
_LOGITS, _BIASED, _EXPERTS = "ffn_moe_logits", "ffn_moe_logits_biased", "ffn_moe_topk"
_NORMED = "normed by the router"
_INPUTS = ("attn_norm", "attn_post_norm", "post_attn_norm", "ffn_norm", "model.layers.{}.ffn_out", _NORMED)
"""The names of a router's input; in a layer with several of these nodes it is the last one.

The node that a router's own norm makes has no name, and is known by the scales in it.
"""
_ROUTER_NORM = re.compile(rb"blk\.([0-9]+)\.ffn_gate_inp\.scale")
_UNNAMED, _PRODUCT = b"node_", b"MUL"
_SCORES = (_LOGITS, _BIASED, "ffn_moe_probs_biased", "ffn_moe_probs_masked")
"""Nodes with the scores of the choice; the last one that a layer has decides."""
_PROBABILITIES = "ffn_moe_probs"
_LOGITS_BY_OPERATION = {b"MUL_MAT": _LOGITS, b"ADD": _BIASED}
"""The nodes of logits by operation: if the logits themselves decide, they end up with the name of probabilities."""
_WEIGHTS = ("ffn_moe_weights", "ffn_moe_weights_softmax", "ffn_moe_weights_norm", "ffn_moe_weights_scaled")
"""Nodes with weights; the last one that a layer has holds them as they are applied."""
_TOKENS_LAST = frozenset({"ffn_moe_weights", "ffn_moe_weights_softmax", "ffn_moe_weights_scaled"})
"""Nodes whose shape in ggml is [1, K, T]; others are [K, T]."""
_NODE = re.compile(f"({'|'.join((*_INPUTS[:-1], *_SCORES, _PROBABILITIES, _EXPERTS, *_WEIGHTS))})-([0-9]+)".encode())

_FINAL_NORM = b"result_norm"
"""The final norm's output, as every model's graph names it."""

_BEFORE_HEAD = ("result_norm", -1)


class RoutingCollector:
    """Copies the choices of every router out of the running graph."""

    def __init__(self) -> None:
        # the runtime keeps only the address: this object must live as long as the context
        self.callback = api.ggml_backend_sched_eval_callback(self._visit)
        self._parts: dict[tuple[str, int], list[npt.NDArray[Any]]] | None = None
        self._feed: _Feed | None = None
        self._last_read = _BEFORE_HEAD  # the last node of a pass: its name and layer
        self._end: tuple[str, int] | None = None
        self._n_layers = 0
        self._scores: npt.NDArray[np.float32] | None = None  # the last scores of the running layer

    def start(self, inputs: RouterInputs | None = None, first: int = 0) -> None:
        """Forgets everything collected and begins again.

        Args:
            inputs: hidden states for routers and experts in place of the runtime's own.
            first: the index in ``inputs`` of the first token that is evaluated.
        """
        self._parts = defaultdict(list)
        self._feed = None if inputs is None else _Feed(inputs, first)

    def finish(self, n_tokens: int) -> RoutingRecord:
        """Returns the routing collected since :meth:`start`.

        Raises:
            InputError: the routers could not be fed.
        """
        assert self._parts is not None
        (parts, self._parts), (feed, self._feed) = (self._parts, None), (self._feed, None)
        if feed is not None and feed.error is not None:
            raise feed.error
        layers = sorted({layer for kind, layer in parts if kind == _EXPERTS})
        self._n_layers = max(self._n_layers, layers[-1] + 1)
        self._last_read = _last_weights(parts, layers[-1]), layers[-1]
        top_k = max(parts[_EXPERTS, layer][0].shape[1] for layer in layers)
        experts_LTK = np.full((self._n_layers, n_tokens, top_k), NO_EXPERT, dtype=np.int32)
        weights_LTK = np.zeros(experts_LTK.shape, dtype=np.float32)
        margins_LT = np.full(experts_LTK.shape[:2], np.inf, dtype=np.float32)
        for layer in layers:  # the others have no experts
            experts_TK, weights_TK, margins_T = (
                np.concatenate(parts[kind, layer]) for kind in (_EXPERTS, _last_weights(parts, layer), _LOGITS)
            )
            assert experts_TK.shape == weights_TK.shape, "experts and weights disagree"
            assert len(experts_TK) == n_tokens, f"routing of {len(experts_TK)} of {n_tokens} tokens"
            n_chosen = experts_TK.shape[1]
            experts_LTK[layer, :, :n_chosen], weights_LTK[layer, :, :n_chosen] = experts_TK, weights_TK
            margins_LT[layer] = margins_T
        return RoutingRecord(experts_LTK, weights_LTK, margins_LT)

    @contextmanager
    def without_logits(self, last_layer: int) -> Iterator[None]:
        """Ends graphs before the logits, which would cost the most.

        They end after the routing of the model's last layer; in a first pass, which finds the last such node, and if
        that layer has no experts, they end before the output head.
        """
        self._n_layers = last_layer + 1
        self._end = self._last_read if self._last_read[1] == last_layer else _BEFORE_HEAD
        try:
            yield
        finally:
            self._end = None

    def _visit(self, address: int, ask: bool, user_data: int) -> bool:
        """Is called for every node before it runs (``ask``: accept it?) and, if we accepted, after it."""
        tensor = _TensorHead.from_address(address)
        if self._end is not None and tensor.name == _FINAL_NORM:
            return ask  # false afterwards: the graph ends here
        if self._parts is None or (self._feed is not None and self._feed.error is not None):
            return not ask
        node, layer = _node(tensor)
        if ask:
            return node is not None and (node not in _INPUTS or self._is_fed(layer))
        if node is None:
            return True
        if node in _INPUTS:
            return self._feed is not None and self._feed.write(layer, tensor, address)
        if node == _LOGITS and self._feed is not None and not self._feed.reached(layer, tensor):
            return False
        values = _values(tensor, address, token_dimension=2 if node in _TOKENS_LAST else 1)
        if node in _SCORES:
            self._scores = values  # the nodes of one layer run before those of the next
            return (node, layer) != self._end
        self._parts[node, layer].append(values)
        if node == _EXPERTS:  # now k is known, and margins take less room than scores
            assert self._scores is not None
            self._parts[_LOGITS, layer].append(selection_margins(self._scores, values.shape[1]))
        return (node, layer) != self._end

    def _is_fed(self, layer: int) -> bool:
        return self._feed is not None and self._feed.has(layer)


class _Feed:
    """Replaces the graph's hidden states by torch's.

    An exception must not leave a callback: it is kept, and the callback ends the evaluation.
    """

    def __init__(self, inputs: RouterInputs, first: int) -> None:
        self.error: InputError | None = None
        self._inputs = inputs
        self._next = defaultdict[int, int](lambda: first)  # the layer's next token
        self._written: dict[int, int] = {}  # address of the tensor that was written last, by layer

    def has(self, layer: int) -> bool:
        """True if there are states for a layer: layers without experts have none."""
        return self._inputs.states_path(layer).exists()

    def write(self, layer: int, tensor: _TensorHead, address: int) -> bool:
        """Replaces the normalised hidden states of a layer's MoE block; False if they cannot be."""
        width, n_tokens = tensor.lengths[0], tensor.lengths[1]
        try:
            states_TD = self._inputs.states(layer, self._next[layer], self._next[layer] + n_tokens)
        except InputError as error:
            self.error = error
            return False
        if tensor.type != api.GGML_TYPE_F32 or states_TD.shape[1] != width:
            self.error = InputError(
                f"layer {layer} of the file has hidden states of width {width}, torch's are {states_TD.shape[1]} wide"
            )
            return False
        _ggml_copy("ggml_backend_tensor_set")(address, states_TD.ctypes.data, 0, states_TD.nbytes)
        self._written[layer] = address
        return True

    def reached(self, layer: int, logits: _TensorHead) -> bool:
        """True if the router's logits were computed from the written states: ``mul_mat(router, states)``."""
        if logits.sources[1] == self._written.get(layer):
            self._next[layer] += logits.lengths[1]
            return True
        try:
            self._inputs.states(layer, 0, 1)
        except InputError as error:
            self.error = error
            return False
        names = " or ".join(f"{name}-{layer}" for name in _INPUTS)
        self.error = InputError(f"llama.cpp's router of layer {layer} does not read {names}: it cannot be fed")
        return False


def _node(tensor: _TensorHead) -> tuple[str | None, int]:
    """The name and the layer of a node that is read or fed; other nodes have None as name."""
    matched = _NODE.fullmatch(tensor.name)
    if matched is None:
        return _router_norm(tensor)
    name, layer = matched[1].decode(), int(matched[2])
    return _LOGITS_BY_OPERATION.get(_operation(tensor)) if name == _PROBABILITIES else name, layer


def _router_norm(tensor: _TensorHead) -> tuple[str | None, int]:
    """The name for a node without one that multiplies by the scales of a router's own norm."""
    if not tensor.name.startswith(_UNNAMED) or tensor.sources[1] is None or _operation(tensor) != _PRODUCT:
        return None, 0
    matched = _ROUTER_NORM.fullmatch(_TensorHead.from_address(tensor.sources[1]).name)
    return (None, 0) if matched is None else (_NORMED, int(matched[1]))


def _operation(tensor: _TensorHead) -> bytes:
    """The name of the operation that makes a node's values."""
    name: bytes = ggml_function("ggml_op_name", ctypes.c_char_p)(tensor.operation)
    return name


def _last_weights(parts: Mapping[tuple[str, int], object], layer: int) -> str:
    """The last of the nodes that hold a layer's weights."""
    return next(kind for kind in reversed(_WEIGHTS) if (kind, layer) in parts)


def _values(tensor: _TensorHead, address: int, *, token_dimension: int) -> npt.NDArray[Any]:
    """Returns [T, K] of a tensor that is [K, T] (perhaps a strided view) or [1, K, T] in ggml's order of dimensions."""
    return _copied(tensor, address).reshape(tensor.lengths[token_dimension], -1).copy()


def _copied(tensor: _TensorHead, address: int) -> npt.NDArray[Any]:
    """A copy of a tensor of float32 or int32, perhaps a strided view, in the reverse of ggml's order of dimensions."""
    dtype = np.dtype(np.int32 if tensor.type == api.GGML_TYPE_I32 else np.float32)
    lengths, strides = tuple(tensor.lengths), tuple(tensor.strides)
    n_bytes = dtype.itemsize + sum((length - 1) * stride for length, stride in zip(lengths, strides, strict=True))
    raw = np.empty(n_bytes, dtype=np.uint8)
    _ggml_copy("ggml_backend_tensor_get")(address, raw.ctypes.data, 0, n_bytes)
    return np.ndarray(lengths[::-1], dtype, buffer=raw.data, strides=strides[::-1])


def node_name(address: int) -> str:
    """The name of a node that the callback is called with."""
    name: bytes = _TensorHead.from_address(address).name
    return name.decode()


def node_values(address: int) -> npt.NDArray[Any]:
    """The values of a node of float32 or int32 that has run, without leading axes of length 1: [T, ...]."""
    values = _copied(_TensorHead.from_address(address), address)
    while values.ndim > 2 and len(values) == 1:
        values = values[0]
    return values


def ggml_function(name: str, result: Any) -> Any:
    """A function of the runtime's own libggml-base that llama-cpp-python does not wrap."""
    function = getattr(_ggml.libggml, name)
    function.restype = result
    return function


@functools.cache
def _ggml_copy(name: str) -> Any:
    """``ggml_backend_tensor_get`` or ``_set``: (tensor, our memory, offset, bytes), for tensors on any device."""
    function = ggml_function(name, None)
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    return function
