"""ONNX Runtime as a backend: logits, routing, greedy text and cost of an exported decoder.

Works on any decoder whose cache inputs and outputs are named ``past_key_values.N.key`` and ``present.N.key``, as
onnxruntime-genai and optimum name them, or ``conv_state`` and ``recurrent_state`` where a layer carries states, in
float32 or float16. Routing is read where the MoE blocks are com.microsoft
MoE or QMoE nodes. The operators do not show which experts they chose, only their input logits are visible: routing is
computed from these by the operators' own rule (softmax over all experts, top-k, renormalised if the node says so; of
two equal logits the lower expert index wins). If nodes chose beforehand, the logits of all other experts are so low
that the rule finds the chosen ones again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from compressors.model.errors import InputError, MoeExportError
from compressors.model.files.onnx_names import cached_layer, continued_cache
from compressors.model.predictions.routing_record import NO_EXPERT, RoutingRecord
from validate.files.onnx_files import onnx_model_file
from validate.routing.router_inputs import RouterInputs
from validate.runtimes import time_limit
from validate.runtimes.backend import ChooseToken, ChunkOutput, RuntimeCrashError, scored_positions
from validate.runtimes.cost import CHUNK_TOKENS, Feed, RuntimeCost, measure_cost
from validate.runtimes.onnx_inputs import (
    bind_logits_to_keep,
    cache_shapes,
    check_decoder,
    float_type,
    keeps_last_logits,
    sized,
    token_inputs,
)

if TYPE_CHECKING:  # a process that only measures a file needs no graph
    import onnx

    from validate.runtimes.onnx_router import MoeNode

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeError", "measure"]

_ERRORS = (
    ort_errors.EPFail,
    ort_errors.EngineError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.ModelLoaded,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,  # errors without a status: of bound inputs and outputs, and exceptions of the library
    ValueError,
)
"""The runtime's errors, which have no common base of their own."""


class OnnxRuntimeError(MoeExportError):
    """The runtime contradicts itself, so its routing cannot be trusted."""


class OnnxRuntimeBackend:
    """An exported model in ONNX Runtime.

    Args:
        path: the model's folder, or its ``.onnx`` file.
        threads: threads inside an operator.
        providers: execution providers, the first that can run a node runs it.

    Raises:
        InputError: the file or its weights are missing or damaged, or it is not a decoder with these names.
    """

    def __init__(self, path: Path, *, threads: int, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        self._path = onnx_model_file(path)
        self._threads = threads
        self._providers = tuple(providers)
        self._session = _open_session(self._path, str(self._path), threads, self._providers)
        check_decoder(self._path, self._session)
        self._moe_nodes: tuple[MoeNode, ...] | None = None  # known when the session shows their router logits
        caches = cache_shapes(self._session)
        self._n_cached = len({name.rpartition(".")[0] for name in caches})
        self._n_layers = max([self._n_cached, *(cached_layer(name) + 1 for name in caches)])

    @property
    def runtime(self) -> str:
        """The runtime's name, ``onnxruntime``."""
        return "onnxruntime"

    @property
    def version(self) -> str:
        """The installed version."""
        return str(onnxruntime.__version__)

    @property
    def vocab_size(self) -> int:
        """The number of logits of one position."""
        return _vocab_size(self._session)

    @property
    def bos_token(self) -> int | None:
        """The token that the tokenizer beside the model puts before a text; None if it puts none.

        Raises:
            InputError: there is no tokenizer.
        """
        from compressors.model.files.tokenizer_files import read_tokenizer_json

        path = self._path.parent / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path} is missing: it says whether a text begins with BOS; put it there")
        tokenizer = read_tokenizer_json(path)
        tokens, alone = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
        return tokens[0] if tokens[:1] != alone[:1] else None

    def run(self, tokens_BT: npt.NDArray[np.int64]) -> Iterator[ChunkOutput]:
        """Runs every row from an empty cache and yields its logits and routing, in order.

        Routing comes from a debug copy of the graph over the same weight file, with the router logits as additional
        outputs. On the first chunk its logits must equal those of the shipped graph, bit for bit. A graph without MoE
        nodes is a dense model's: it has no routing, and needs no copy.

        Raises:
            InputError: a token is not in the vocabulary.
            OnnxRuntimeError: the logits differ; the backend cannot be used any more.
            RuntimeCrashError: the runtime could not run the graph.
        """
        size = _vocab_size(self._session)
        if tokens_BT.min() < 0 or tokens_BT.max() >= size:
            raise InputError(f"token {tokens_BT.max()} is not in the vocabulary of {size}; was another tokenizer used?")
        for tokens in tokens_BT:
            if self._moe_nodes is None:
                self._moe_nodes = self._show_routing(tokens)
            names = [name for node in self._moe_nodes for name in node.shown]
            logits_TV, values = _run_from_empty_cache(self._session, tokens, names)
            shown = dict(zip(names, values, strict=True))
            routing = None
            if self._moe_nodes:
                routing = self._routing([(node, shown) for node in self._moe_nodes], len(tokens))
            yield ChunkOutput(logits_TV[scored_positions(len(tokens))], routing)

    def _routing(self, shown: Sequence[tuple[MoeNode, Mapping[str, npt.NDArray[Any]]]], n_tokens: int) -> RoutingRecord:
        """Makes the record; layers without experts, and places beyond a layer's top-k, hold no expert.

        Args:
            shown: the nodes, each with the values that its routing is computed from.
            n_tokens: the number of tokens of these values.
        """
        n_layers = max(self._n_layers, *(node.layer + 1 for node, _ in shown))
        size = (n_layers, n_tokens, max(node.top_k for node, _ in shown))
        experts_LTK = np.full(size, NO_EXPERT, dtype=np.int32)
        weights_LTK = np.zeros(size, dtype=np.float32)
        margins_LT = np.full(size[:2], np.inf, dtype=np.float32)
        for node, values in shown:
            found = node.routing(values, n_tokens)
            experts_LTK[node.layer, :, : node.top_k] = found.experts_TK
            weights_LTK[node.layer, :, : node.top_k] = found.weights_TK
            margins_LT[node.layer] = found.margins_T
        return RoutingRecord(experts_LTK, weights_LTK, margins_LT)

    def route(self, tokens_BT: npt.NDArray[np.int64], inputs: RouterInputs) -> RoutingRecord:
        """Returns the routers' choices for these chunks when each router is given torch's hidden states.

        Each router runs as a graph of its own, cut out of the model's, with the model's weights.

        Raises:
            InputError: the states are of another model, or a router has another input than its experts.
            RuntimeCrashError: the runtime could not run a router.
        """
        import onnx

        from validate.runtimes.onnx_router import moe_nodes

        model = onnx.load(self._path, load_external_data=False)
        nodes, n_tokens = tuple(moe_nodes(model.graph)), tokens_BT.size
        return self._routing([(node, self._run_router(model, node, inputs, n_tokens)) for node in nodes], n_tokens)

    def _run_router(
        self, model: onnx.ModelProto, node: MoeNode, inputs: RouterInputs, n_tokens: int
    ) -> Mapping[str, npt.NDArray[Any]]:
        """The values that one router's choices are computed from."""
        from validate.runtimes.onnx_router import router_graph

        graph = router_graph(model, node.states, node.shown)
        if graph is None:
            raise InputError(f"{self._path}: the router of layer {node.layer} does not read what its experts read")
        session = _open_session(self._path, graph.SerializeToString(), self._threads)
        states_1TD = inputs.states(node.layer, 0, n_tokens)[None]
        with _running():
            values = session.run(node.shown, {node.states: states_1TD})
        return dict(zip(node.shown, values, strict=True))

    def generate(self, prompt_ids: Sequence[int], n_tokens: int, choose: ChooseToken) -> list[int]:
        """Generates at most ``n_tokens`` tokens after the prompt, one after the other, through the cache."""
        generation = _Generation(self._session, capacity=len(prompt_ids) + n_tokens)
        tokens: list[int] = []
        logits_V = generation.feed(np.asarray(prompt_ids, dtype=np.int64))
        while (token := choose(logits_V)) is not None:
            tokens.append(token)
            if len(tokens) == n_tokens:
                break
            logits_V = generation.feed(np.array(tokens[-1:]))
        return tokens

    def generate_together(
        self, prompts: Sequence[Sequence[int]], n_tokens: int, choose: Sequence[ChooseToken]
    ) -> list[list[int]]:
        """Generates ``n_tokens`` tokens after each prompt, one text after the other."""
        return [self.generate(prompt, n_tokens, one) for prompt, one in zip(prompts, choose, strict=True)]

    def last_logits(self, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        """Yields for each text the logits of its last ``count`` positions: [count, V]."""
        names = [name for node in self._moe_nodes or () for name in node.shown]
        for text, count in zip(texts, counts, strict=True):
            logits_TV, _ = _run_from_empty_cache(self._session, np.asarray(text, dtype=np.int64), names, count)
            yield logits_TV[-count:]

    def _show_routing(self, tokens: npt.NDArray[np.int64]) -> tuple[MoeNode, ...]:
        """Replaces the session by the debug copy; one after the other, because each holds the weights.

        Returns the MoE nodes whose routing it shows; if there are none, the session stays.
        """
        import onnx

        from validate.runtimes.onnx_router import moe_nodes

        model = onnx.load(self._path, load_external_data=False)
        found = tuple(moe_nodes(model.graph))
        if not found:
            return ()
        if any(node.layer < 0 or node.n_mixers > self._n_cached for node in found):
            raise InputError(
                f"{self._path} has caches of {self._n_cached} layers, but MoE and attention operators of a different "
                "number; export it again"
            )
        # has the type that the runtime infers
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for node in found for name in node.shown)
        shipped = _logits_digest(self._session, tokens)
        del self._session
        debug = _open_session(self._path, model.SerializeToString(), self._threads, self._providers)
        if _logits_digest(debug, tokens) != shipped:
            raise OnnxRuntimeError(
                f"{self._path}: the copy of the graph that shows routing gives other logits than the graph itself; "
                "its routing would prove nothing"
            )
        self._session = debug
        return found


def measure(
    folder: Path,
    *,
    context: int,
    threads: int,
    prompt_tokens: Sequence[int],
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> RuntimeCost:
    """Runs :func:`validate.runtimes.cost.measure_cost`. The runtime's Python interface does not show its buffers.

    Args:
        folder: the model's folder, or its ``.onnx`` file.
        context: tokens of cache to fill, at least 64.
        threads: threads inside an operator.
        prompt_tokens: the text to feed, repeated until the cache is full.
        providers: execution providers, the first that can run a node runs it.

    Raises:
        InputError: the model cannot be loaded, the context is too short or the prompt is empty.
    """

    def load() -> Feed:
        path = onnx_model_file(folder)
        return _Generation(_open_session(path, str(path), threads, providers), capacity=context).feed

    return measure_cost(load, context=context, prompt_tokens=prompt_tokens)


class _Generation:
    """One sequence growing in a cache that is allocated once; every step writes keys, values and states in place."""

    def __init__(self, session: onnxruntime.InferenceSession, *, capacity: int) -> None:
        self._session = session
        self._length = 0
        self._cache: dict[str, onnxruntime.OrtValue] = {}
        for name, shape in cache_shapes(session).items():
            empty = np.zeros(sized(shape, 1, capacity), dtype=float_type(session.get_inputs(), name))
            self._cache[name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
        n_positions = 1 if keeps_last_logits(session) else min(capacity, CHUNK_TOKENS)
        size, kind = (1, n_positions, _vocab_size(session)), float_type(session.get_outputs(), "logits")
        self._logits_1TV = np.empty(size, dtype=kind)

    def feed(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Appends tokens, in chunks, and returns the next one's logits [V], valid until the next call."""
        for first in range(0, len(tokens), CHUNK_TOKENS):
            logits_V = self._step(tokens[first : first + CHUNK_TOKENS])
        return logits_V

    def _step(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        past_length = self._length
        self._length += len(tokens)
        binding = self._session.io_binding()
        for name, values in token_inputs(self._session, tokens, past_length).items():
            binding.bind_cpu_input(name, values)
        for name, buffer in self._cache.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(continued_cache(name), buffer)
        logits = self._logits_1TV[:, : len(tokens)]  # bound, because reading an output of the runtime copies it
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        with _running():
            self._session.run_with_iobinding(binding)
        logits_V: npt.NDArray[np.float32] = logits[0, -1].astype(np.float32)
        return logits_V


def _run_from_empty_cache(
    session: onnxruntime.InferenceSession, tokens: npt.NDArray[np.int64], outputs: list[str], n_positions: int = 0
) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]:
    """Returns logits [T, V], which stay where the runtime has put them, and the other outputs.

    Memory of our own cannot be bound: where a graph declares logits of one position, the runtime takes no other size.

    Args:
        session: the loaded graph.
        tokens: the text.
        outputs: names of the other outputs.
        n_positions: the number of last positions that have logits, where the graph leaves a choice; 0: all.
    """
    from torch.utils.dlpack import from_dlpack  # a process that only measures a file needs no torch

    binding = session.io_binding()
    for name, values in token_inputs(session, tokens, 0).items():
        binding.bind_cpu_input(name, values)
    if keeps_last_logits(session):
        bind_logits_to_keep(binding, n_positions)
    for name, shape in cache_shapes(session).items():
        empty = np.zeros(sized(shape, 1, 0), dtype=float_type(session.get_inputs(), name))
        binding.bind_cpu_input(name, empty)
    for name in ("logits", *outputs):
        binding.bind_output(name)
    options = onnxruntime.RunOptions()
    # the arena would keep the memory of one chunk, and grow with the next
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    with _running():
        session.run_with_iobinding(binding, options)
    logits, *others = binding.get_outputs()
    logits_TV: npt.NDArray[np.float32] = from_dlpack(logits)[0].float().numpy()  # numpy's own would be read-only
    return logits_TV, [output.numpy() for output in others]


@contextmanager
def _running() -> Iterator[None]:
    """Turns an error of the runtime, or a call that does not return, into a finding about the graph."""
    try:
        with time_limit.working():
            yield
    except _ERRORS as error:
        raise RuntimeCrashError(f"ONNX Runtime could not run the graph: {' '.join(str(error).split())}") from None


def _logits_digest(session: onnxruntime.InferenceSession, tokens: npt.NDArray[np.int64]) -> str:
    logits_TV, _ = _run_from_empty_cache(session, tokens, [])
    return hashlib.sha256(logits_TV.data).hexdigest()


def _vocab_size(session: onnxruntime.InferenceSession) -> int:
    return next(int(output.shape[-1]) for output in session.get_outputs() if output.name == "logits")


def _open_session(
    path: Path, model: str | bytes, threads: int, providers: Sequence[str] = ("CPUExecutionProvider",)
) -> onnxruntime.InferenceSession:
    """Loads a graph from a path or from bytes; either way its weights lie beside ``path``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The runtime's warnings are about its own optimisations, and about logits of more positions than one.
    options.log_severity_level = 3
    if isinstance(model, bytes):
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.resolve().parent)
        )
    try:
        with time_limit.working():
            return onnxruntime.InferenceSession(model, options, providers=list(providers))
    except _ERRORS as error:
        raise InputError(f"{path} does not load in ONNX Runtime ({error}); export it again") from None
