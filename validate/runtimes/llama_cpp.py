"""llama.cpp as a validation backend, through llama-cpp-python's low-level interface.

Routing is read inside the runtime: the scheduler's evaluation callback gives us the same tensors with which the MoE
layers choose and weigh their experts (:mod:`validate.runtimes.llama_cpp_routing`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt

from compressors.model.errors import InputError
from compressors.model.files.gguf.kv_types import KV_TYPES, is_quantized
from validate.routing.router_inputs import RouterInputs
from validate.runtimes import time_limit
from validate.runtimes.backend import ChooseToken, ChunkOutput, RoutingRecord, RuntimeCrashError, scored_positions
from validate.runtimes.buffers import ReportedBuffers
from validate.runtimes.cost import Feed, RuntimeCost, measure_cost
from validate.runtimes.llama_cpp_routing import RoutingCollector, ggml_function

__all__ = [
    "QUANTIZED_KV_TYPES",
    "LlamaCppBackend",
    "exact_kv_type",
    "logged_error",
    "measure",
    "start_runtime",
]

QUANTIZED_KV_TYPES = tuple(name for name in KV_TYPES if is_quantized(name))
"""Types that are not used to compare a file with torch: their loss is not the file's fault, and reported apart."""


def exact_kv_type(kv_type: str) -> str:
    """The type of cache for comparing a file with torch: f16 in place of a quantized one."""
    return "f16" if kv_type in QUANTIZED_KV_TYPES else kv_type


_PHYSICAL_BATCH = 512  # llama.cpp's default n_ubatch


class LlamaCppBackend:
    """A GGUF file in llama.cpp; implements :class:`validate.runtimes.backend.Backend`.

    Flash attention is on if the cache is quantized, as llama.cpp requires, and off otherwise.
    Weights stay as they are stored: repacked and AMX buffers are off, because llama.cpp dies on virtual machines that
    list the AMX instructions but trap them.

    Raises:
        InputError: the file is missing, llama.cpp cannot load it, or it cannot set up the context.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 512,
        kv_type: str = "f16",
        flash_attention: bool = False,
        threads: int,
        gpu_layers: int = 0,
    ) -> None:
        self._routing = RoutingCollector()
        flash_attention = flash_attention or kv_type in QUANTIZED_KV_TYPES
        flash = api.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._session = _Session(
            path,
            n_ctx=n_ctx,
            n_batch=n_ctx,
            kv_type=kv_type,
            flash_attention=flash,
            threads=threads,
            gpu_layers=gpu_layers,
            callback=self._routing.callback,
        )

    @property
    def runtime(self) -> str:
        """``llama.cpp``."""
        return "llama.cpp"

    @property
    def version(self) -> str:
        """The version of llama-cpp-python and, in brackets, of the ggml inside it."""
        ggml = ctypes.string_at(ggml_function("ggml_version", ctypes.c_void_p)()).decode()
        commit = ctypes.string_at(ggml_function("ggml_commit", ctypes.c_void_p)()).decode()
        return f"{version('llama-cpp-python')} (ggml {ggml}, {commit})"

    @property
    def vocab_size(self) -> int:
        """The number of logits of one position."""
        return self._session.vocab_size

    @property
    def bos_token(self) -> int | None:
        """The token that llama.cpp puts before a text; None if it puts none."""
        return self._session.bos_token

    def run(self, tokens_BT: npt.NDArray[np.int64]) -> Iterator[ChunkOutput]:
        """Runs every row as a sequence of its own and yields its output, in order; a dense file has no routing.

        Raises:
            InputError: a row is longer than the context, or a token is not in the vocabulary.
        """
        for tokens_T in tokens_BT:
            if self._session.has_experts:
                self._routing.start()
            logits_SV = self._decode_chunk(tokens_T)
            yield ChunkOutput(logits_SV, self._routing.finish(len(tokens_T)) if self._session.has_experts else None)

    def route(self, tokens_BT: npt.NDArray[np.int64], inputs: RouterInputs) -> RoutingRecord:
        """Returns the routers' choices for these chunks when each router is given torch's hidden states.

        The states replace the normalised input of each layer's MoE block while the graph runs, so no router sees the
        effect of earlier layers.

        Raises:
            InputError: the states are of another model, or the graph's routers cannot be fed.
        """
        parts = []
        for chunk, tokens_T in enumerate(tokens_BT):
            self._routing.start(inputs, first=chunk * len(tokens_T))
            self._decode_chunk(tokens_T)
            parts.append(self._routing.finish(len(tokens_T)))
        return RoutingRecord.concatenate(parts)

    def _decode_chunk(self, tokens_T: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Runs a chunk as a sequence of its own; returns the logits at the scored positions."""
        self._session.clear()
        self._session.check(tokens_T)
        # logits at all positions, because the last layer's experts only run, and route, where an output is asked for;
        # in halves, so that only half of the logits are in memory at a time: the scored ones come last
        scored = scored_positions(len(tokens_T))
        with self._routing.without_logits(self._session.n_layers - 1):
            self._session.decode(tokens_T[: scored.start], all_logits=True)
        return self._session.decode(tokens_T[scored.start :], all_logits=True)[: scored.stop - scored.start]

    def generate(self, prompt_ids: Sequence[int], n_tokens: int, choose: ChooseToken) -> list[int]:
        """Generates at most ``n_tokens`` tokens after the prompt, each chosen from the logits of the last position."""
        self._session.clear()
        generated: list[int] = []
        logits_TV = self._session.decode(np.asarray(prompt_ids, dtype=np.int64))
        while (token := choose(logits_TV[-1])) is not None:
            generated.append(token)
            if len(generated) == n_tokens:
                break
            logits_TV = self._session.decode(np.asarray(generated[-1:], dtype=np.int64))
        return generated

    def last_logits(self, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        """Yields for each text the logits of its last ``count`` positions: [count, V], valid until the next one."""
        for text, count in zip(texts, counts, strict=True):
            tokens_T = np.asarray(text, dtype=np.int64)
            self._session.clear()
            self._session.check(tokens_T)
            if count < len(tokens_T):
                self._session.decode(tokens_T[:-count])
            yield self._session.decode(tokens_T[-count:], all_logits=True)


def measure(
    path: Path, *, context: int, kv_type: str, threads: int, prompt_tokens: Sequence[int], gpu_layers: int = 0
) -> RuntimeCost:
    """Runs :func:`validate.runtimes.cost.measure_cost`, and adds the buffers that llama.cpp's log names.

    Flash attention is left to llama.cpp's choice.

    Args:
        path: the GGUF file.
        context: tokens of cache to fill, at least 64.
        kv_type: a key of :data:`~compressors.model.files.gguf.kv_types.KV_TYPES`.
        threads: threads for prompt and generation.
        prompt_tokens: the text to feed, repeated until the context is full.
        gpu_layers: layers on a GPU.

    Raises:
        InputError: the model cannot be loaded, the context is too short or the prompt is empty.
    """

    def load() -> Feed:
        session = _Session(
            path,
            n_ctx=context,
            n_batch=min(context, _PHYSICAL_BATCH),
            kv_type=kv_type,
            flash_attention=api.LLAMA_FLASH_ATTN_TYPE_AUTO,
            threads=threads,
            gpu_layers=gpu_layers,
        )
        return lambda tokens_T: session.decode(tokens_T)[-1]

    start_runtime()
    _buffers.clear()
    cost = measure_cost(load, context=context, prompt_tokens=prompt_tokens)
    return replace(cost, buffers=_buffers.by_purpose, device_bytes=_buffers.on_device)


class _Session:
    """A loaded model with one context that holds one sequence; frees both when it is deleted."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int,
        n_batch: int,
        kv_type: str,
        flash_attention: int,
        threads: int,
        gpu_layers: int,
        callback: Any = None,
    ) -> None:
        self._model: int | None = None
        self._context: int | None = None
        self._n_ctx = n_ctx
        self._length = 0
        if kv_type not in KV_TYPES:
            raise InputError(f"--kv-type {kv_type}: no such type; choose one of {', '.join(KV_TYPES)}")
        start_runtime()
        self._model = _load_model(path, gpu_layers)
        architecture = _metadata(self._model, "general.architecture")
        self.n_layers = int(api.llama_model_n_layer(self._model))  # without those that predict further tokens
        self.has_experts = int(_metadata(self._model, f"{architecture}.expert_count") or 0) > 0
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, min(n_batch, _PHYSICAL_BATCH)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = int(KV_TYPES[kv_type])
        params.flash_attn_type = flash_attention
        params.swa_full = False  # as in llama.cpp's own programs: layers with a window cache no more than it needs
        if callback is not None:
            params.cb_eval = callback
        with time_limit.working():
            self._context = api.llama_init_from_model(self._model, params)
        if self._context is None:
            raise InputError(
                f"{path}: llama.cpp cannot set up a context of {n_ctx} tokens with {kv_type} keys and values"
                f"{logged_error()}; quantized ones need flash attention"
            )
        vocabulary = api.llama_model_get_vocab(self._model)
        assert vocabulary is not None
        self.vocab_size = int(api.llama_vocab_n_tokens(vocabulary))
        adds_bos = api.llama_vocab_get_add_bos(vocabulary)
        self.bos_token = int(api.llama_vocab_bos(vocabulary)) if adds_bos else None

    def __del__(self) -> None:
        if self._context is not None:
            api.llama_free(self._context)
        if self._model is not None:
            api.llama_model_free(self._model)

    def clear(self) -> None:
        """Empties the cache."""
        assert self._context is not None
        memory = api.llama_get_memory(self._context)
        assert memory is not None
        api.llama_memory_clear(memory, True)
        self._length = 0

    def decode(self, tokens_T: npt.NDArray[np.int64], *, all_logits: bool = False) -> npt.NDArray[np.float32]:
        """Appends tokens to the sequence.

        Returns float32 [T, V], or [1, V] for the last position alone: a view that is valid until the next call.

        Raises:
            InputError: the tokens cannot be appended.
            RuntimeCrashError: llama.cpp could not evaluate them.
        """
        self.check(tokens_T)
        n_tokens = len(tokens_T)
        batch = api.llama_batch_init(n_tokens, 0, 1)
        try:
            batch.n_tokens = n_tokens
            for index, token in enumerate(tokens_T.tolist()):
                batch.token[index] = token
                batch.pos[index] = self._length + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = all_logits or index == n_tokens - 1
            with time_limit.working():
                status = api.llama_decode(self._context, batch)
        finally:
            api.llama_batch_free(batch)
        if status != 0:
            raise RuntimeCrashError(f"llama.cpp could not evaluate {n_tokens} tokens (status {status}){logged_error()}")
        self._length += n_tokens
        n_rows = n_tokens if all_logits else 1
        pointer = ctypes.cast(api.llama_get_logits(self._context), ctypes.c_void_p)
        assert pointer.value is not None
        logits = (ctypes.c_float * (n_rows * self.vocab_size)).from_address(pointer.value)
        logits.session = self  # type: ignore[attr-defined]  # the memory is the context's: it must not go before
        return np.ctypeslib.as_array(logits).reshape(n_rows, self.vocab_size)

    def check(self, tokens_T: npt.NDArray[np.int64]) -> None:
        """Refuses tokens that cannot be appended."""
        if not 0 < len(tokens_T) <= self._n_ctx - self._length:
            raise InputError(
                f"{len(tokens_T)} tokens after {self._length} do not fit a context of {self._n_ctx}; give more"
            )
        if tokens_T.min() < 0 or tokens_T.max() >= self.vocab_size:
            raise InputError(
                f"token {tokens_T.max()} is not in the vocabulary of {self.vocab_size}; was another tokenizer used?"
            )


def _load_model(path: Path, gpu_layers: int) -> int:
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a GGUF file")
    params = api.llama_model_default_params()
    params.n_gpu_layers = gpu_layers
    params.use_extra_bufts = False
    with time_limit.working():
        model: int | None = api.llama_model_load_from_file(str(path).encode(), params)
    if model is None:
        raise InputError(f"{path} cannot be loaded by llama.cpp{logged_error()}")
    return model


def _metadata(model: int, key: str) -> str | None:
    """A value of the file's metadata as text, None if it has no such key."""
    text = ctypes.create_string_buffer(64)
    length = api.llama_model_meta_val_str(model, key.encode(), text, len(text))
    return None if length < 0 else text.value.decode()


_LOG_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR in ggml/include/ggml.h
_errors: list[str] = []
_buffers = ReportedBuffers()


@api.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_errors(level: int, text: bytes, user_data: int) -> None:
    """Silences llama.cpp's log; errors go into our messages, and buffers are remembered."""
    message = text.decode("utf-8", errors="replace")
    _buffers.read(message)
    if level == _LOG_LEVEL_ERROR:
        _errors.append(message.strip())


@functools.cache
def start_runtime() -> None:
    """Sets up llama.cpp, once; its log goes only into our error messages."""
    api.llama_backend_init()
    api.llama_log_set(_keep_errors, ctypes.c_void_p(0))


def logged_error() -> str:
    """Returns llama.cpp's error as ``: message``, the first of a chain, which names the cause, and forgets it."""
    message = f": {_errors[0]}" if _errors else ""
    _errors.clear()
    return message
