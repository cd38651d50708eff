"""Runs a GGUF file's layer that predicts one more token in llama.cpp, as its speculative decoding does.

Two functions that it needs are not in llama.cpp's C interface (``src/llama-ext.h``): they are found by their C++ names.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt

from validate.runtimes.llama_cpp_session import buffers, start_runtime

__all__ = ["mtp_buffers", "mtp_logits"]

_MTP_CONTEXT = 1  # LLAMA_CONTEXT_TYPE_MTP in include/llama.h


def mtp_logits(path: Path, tokens: list[int]) -> npt.NDArray[np.float32]:
    """The logits of the token after the next one, at every position but the last: [T - 1, V].

    See ``common_speculative_impl_draft_mtp`` in ``common/speculative.cpp``: each token goes with the hidden state in
    front of the head at the position before it.
    """
    model = _loaded(path)
    try:
        states = _decoded(model, tokens, None)
        return _decoded(model, tokens[1:], states[:-1])
    finally:
        api.llama_model_free(model)


def mtp_buffers(path: Path, n_ctx: int) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by purpose of the model's context and of the layer's, as llama-server sets them up to draft three tokens.

    See ``common_speculative_init_result`` in ``common/speculative.cpp``.
    """
    model, found = _loaded(path), []
    try:
        for is_of_layer in (False, True):
            params = api.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 2048, 512
            params.n_rs_seq = 0 if is_of_layer else 3
            params.ctx_type = _MTP_CONTEXT if is_of_layer else 0
            buffers.clear()
            context = api.llama_init_from_model(model, params)
            assert context is not None
            found.append(buffers.by_purpose)
            api.llama_free(context)
    finally:
        api.llama_model_free(model)
    of_model, of_layer = found
    return of_model, of_layer


def _loaded(path: Path) -> int:
    start_runtime()
    params = api.llama_model_default_params()
    params.load_mtp, params.use_extra_bufts = True, False
    model: int | None = api.llama_model_load_from_file(str(path).encode(), params)
    assert model is not None and api.llama_model_n_layer_nextn(model) == 1
    return model


def _decoded(model: int, tokens: list[int], states: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
    """The states in front of the head; or, with the states of the positions before, the logits of the layer."""
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.flash_attn_type = 0
    params.type_k = params.type_v = 0  # float32
    if states is not None:
        params.ctx_type = _MTP_CONTEXT
    context = api.llama_init_from_model(model, params)
    assert context is not None
    batch = api.llama_batch_init(len(tokens), 0, 1)
    embedded = None if states is None else np.ascontiguousarray(states)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place] = token, place + (states is not None)
        batch.n_seq_id[place], batch.logits[place] = 1, 1
        batch.seq_id[place][0] = 0
    if embedded is not None:
        batch.embd = embedded.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    else:
        _function("_Z26llama_set_embeddings_nextnP13llama_contextbb", None, ctypes.c_bool, ctypes.c_bool)(
            context, True, False
        )
    assert api.llama_decode(context, batch) == 0
    if states is None:
        width = api.llama_model_n_embd(model)
        found = _function("_Z26llama_get_embeddings_nextnP13llama_context", ctypes.POINTER(ctypes.c_float))(context)
    else:
        width = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        found = api.llama_get_logits(context)
    values = np.ctypeslib.as_array(found, (len(tokens), width)).copy()
    batch.embd = None
    api.llama_batch_free(batch)
    api.llama_free(context)
    return values


def _function(name: str, result: object, *arguments: object) -> ctypes._NamedFuncPointer:
    function = getattr(api._lib, name)
    function.argtypes, function.restype = [api.llama_context_p_ctypes, *arguments], result
    return function
