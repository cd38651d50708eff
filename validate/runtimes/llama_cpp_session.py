"""A model that llama.cpp has loaded, and a context of it: tokens in, logits out; and llama.cpp's log."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt

from compressors.model.errors import InputError
from compressors.model.files.gguf.kv_types import KV_TYPES
from validate.runtimes import time_limit
from validate.runtimes.backend import RuntimeCrashError
from validate.runtimes.buffers import ReportedBuffers

__all__ = ["PHYSICAL_BATCH", "LoadedModel", "Row", "Session", "buffers", "logged_error", "start_runtime"]

PHYSICAL_BATCH = 512  # llama.cpp's default n_ubatch

buffers = ReportedBuffers()
"""The buffers that llama.cpp's log has named so far."""


@dataclass(frozen=True)
class Row:
    """A token that is appended to a text."""

    token: int
    position: int
    text: int = 0
    wants_logits: bool = False


class LoadedModel:
    """A GGUF file that llama.cpp has loaded; it is freed when it is deleted, which its contexts do not outlive.

    Args:
        path: the GGUF file.
        gpu_layers: layers on a GPU.

    Raises:
        InputError: the file is missing, or llama.cpp cannot load it.
    """

    def __init__(self, path: Path, gpu_layers: int = 0) -> None:
        self.pointer: int | None = None
        start_runtime()
        self.path = path
        self.pointer = _load_model(path, gpu_layers)
        architecture = _metadata(self.pointer, "general.architecture")
        self.n_layers = int(api.llama_model_n_layer(self.pointer))  # without those that predict further tokens
        self.has_experts = int(_metadata(self.pointer, f"{architecture}.expert_count") or 0) > 0
        vocabulary = api.llama_model_get_vocab(self.pointer)
        assert vocabulary is not None
        self.vocab_size = int(api.llama_vocab_n_tokens(vocabulary))
        adds_bos = api.llama_vocab_get_add_bos(vocabulary)
        self.bos_token = int(api.llama_vocab_bos(vocabulary)) if adds_bos else None

    def __del__(self) -> None:
        if self.pointer is not None:
            api.llama_model_free(self.pointer)


class Session:
    """A context of a loaded model; it is freed when it is deleted.

    :meth:`decode` and :meth:`clear` are for a context of one text.

    Args:
        model: the model.
        n_ctx: tokens that the cache has room for, of each text.
        n_batch: the most tokens that are decoded in one call.
        kv_type: a key of :data:`~compressors.model.files.gguf.kv_types.KV_TYPES`.
        flash_attention: a value of ``llama_flash_attn_type``.
        threads: threads for prompt and generation.
        callback: sees the tensors of the graph (``cb_eval``).
        n_texts: texts that the cache holds.

    Raises:
        InputError: the context cannot be set up.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        n_ctx: int,
        n_batch: int,
        kv_type: str,
        flash_attention: int,
        threads: int,
        callback: Any = None,
        n_texts: int = 1,
    ) -> None:
        self._context: int | None = None
        self._model = model
        self._n_ctx = n_ctx
        self._length = 0
        if kv_type not in KV_TYPES:
            raise InputError(f"--kv-type {kv_type}: no such type; choose one of {', '.join(KV_TYPES)}")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_texts * n_ctx, n_batch, min(n_batch, PHYSICAL_BATCH)
        params.n_seq_max = n_texts
        params.kv_unified = n_texts > 1  # a part for each text would have room for at least 256 tokens
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = int(KV_TYPES[kv_type])
        params.flash_attn_type = flash_attention
        params.swa_full = False  # as in llama.cpp's own programs: layers with a window cache no more than it needs
        if callback is not None:
            params.cb_eval = callback
        with time_limit.working():
            self._context = api.llama_init_from_model(model.pointer, params)
        if self._context is None:
            raise InputError(
                f"{model.path}: llama.cpp cannot set up a context of {n_ctx} tokens with {kv_type} keys and values"
                f"{logged_error()}; quantized ones need flash attention"
            )

    def __del__(self) -> None:
        if self._context is not None:
            api.llama_free(self._context)

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
        self.decode_rows(
            [
                Row(token, self._length + index, wants_logits=all_logits or index == n_tokens - 1)
                for index, token in enumerate(tokens_T.tolist())
            ]
        )
        self._length += n_tokens
        n_rows = n_tokens if all_logits else 1
        pointer = ctypes.cast(api.llama_get_logits(self._context), ctypes.c_void_p)
        assert pointer.value is not None
        logits = (ctypes.c_float * (n_rows * self._model.vocab_size)).from_address(pointer.value)
        logits.session = self  # type: ignore[attr-defined]  # the memory is the context's: it must not go before
        return np.ctypeslib.as_array(logits).reshape(n_rows, self._model.vocab_size)

    def decode_rows(self, rows: Sequence[Row]) -> None:
        """Appends tokens to their texts, at most ``n_batch`` of them.

        Raises:
            RuntimeCrashError: llama.cpp could not evaluate them.
        """
        batch = api.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for index, row in enumerate(rows):
                batch.token[index] = row.token
                batch.pos[index] = row.position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = row.text
                batch.logits[index] = row.wants_logits
            with time_limit.working():
                status = api.llama_decode(self._context, batch)
        finally:
            api.llama_batch_free(batch)
        if status != 0:
            raise RuntimeCrashError(
                f"llama.cpp could not evaluate {len(rows)} tokens (status {status}){logged_error()}"
            )

    def row_logits(self, index: int) -> npt.NDArray[np.float32]:
        """The logits of a row of the last call that wanted them: [V], a view that is valid until the next call."""
        pointer = ctypes.cast(api.llama_get_logits_ith(self._context, index), ctypes.c_void_p)
        assert pointer.value is not None, "the row did not want logits"
        return np.ctypeslib.as_array((ctypes.c_float * self._model.vocab_size).from_address(pointer.value))

    def cut(self, text: int, n_kept: int) -> int:
        """Takes all but the first tokens of a text back; returns how many stay, none where a state cannot go back."""
        assert self._context is not None
        memory = api.llama_get_memory(self._context)
        assert memory is not None
        if api.llama_memory_seq_rm(memory, text, n_kept, -1):
            return n_kept
        api.llama_memory_seq_rm(memory, text, -1, -1)
        return 0

    def copy(self, source: int, text: int) -> None:
        """Gives a text whose cache is empty all that the cache holds of another one."""
        assert self._context is not None
        api.llama_memory_seq_cp(api.llama_get_memory(self._context), source, text, -1, -1)

    def check(self, tokens_T: npt.NDArray[np.int64]) -> None:
        """Refuses tokens that cannot be appended."""
        if not 0 < len(tokens_T) <= self._n_ctx - self._length:
            raise InputError(
                f"{len(tokens_T)} tokens after {self._length} do not fit a context of {self._n_ctx}; give more"
            )
        if tokens_T.min() < 0 or tokens_T.max() >= self._model.vocab_size:
            raise InputError(
                f"token {tokens_T.max()} is not in the vocabulary of {self._model.vocab_size}; "
                "was another tokenizer used?"
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


@api.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_errors(level: int, text: bytes, user_data: int) -> None:
    """Silences llama.cpp's log; errors go into our messages, and buffers are remembered."""
    message = text.decode("utf-8", errors="replace")
    buffers.read(message)
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
