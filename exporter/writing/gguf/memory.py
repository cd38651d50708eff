"""The memory that llama.cpp takes to run a file on the CPU, known before the file is written.

An upper bound for stock settings: batches of 512 tokens, one sequence, weights mapped, flash attention left to
llama.cpp, which turns it on. The formulas were fitted to the buffers that llama.cpp reports for six shapes, real
models among them, contexts from 512 to 32768 tokens and three cache types; the memory beside the buffers (the last two
terms of ``compute``) was fitted to resident set sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from compressors.model.description.mixers import GatedDelta, GroupedQuery, Mamba2, Mixer, NoMixer, ShortConvolution
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.gguf.kv_types import KV_TYPES, bytes_per_value, values_per_block

__all__ = ["predict_runtime_bytes"]

_BATCH = 512  # n_batch and n_ubatch
_CONTEXT_STEP = 256  # contexts are rounded up to it (llama_context in src/llama-context.cpp)
_FLOAT = 4
_HALF = 2
_BYTES_PER_TOKEN_TEXT = 420  # a token's text, score and merge in llama_vocab's tables
_BYTES_PER_LAYER_GRAPH = 100 << 10  # about 100 graph nodes, in two graphs and in the scheduler's tables
_BYTES_OF_DELTA_GRAPHS = 16 << 20  # 40 nodes a token in two graphs (graph_max_nodes in src/llama-context.cpp)
_DRAFTED_TOKENS, _DRAFTING_BATCH = 3, 2048  # llama-server's: --spec-draft-n-max, --batch-size (common/common.h)
_LIBRARY_BYTES = 5 << 20  # pages of the libraries that are touched only when a model runs


def predict_runtime_bytes(spec: ModelSpec, file_bytes: int, context: int, kv_type: str) -> dict[str, int]:
    """Bytes by purpose: ``weights``, ``kv_cache`` and ``compute``; the runtime's own base comes on top.

    Raises:
        InputError: there is no such cache type.
        UnsupportedError: a head of the model is not a multiple of the type's blocks.
    """
    if kv_type not in KV_TYPES:
        raise InputError(f"--kv-type {kv_type}: no such type; choose one of {', '.join(KV_TYPES)}")
    block = values_per_block(kv_type)  # a head must be whole blocks (llama_init_from_model in src/llama-context.cpp)
    cut = next((mixer.cached_head for mixer in _mixers(spec) if mixer.cached_head % block), None)
    if cut is not None:
        raise UnsupportedError(
            f"--kv-type {kv_type}: llama.cpp stores such keys and values in blocks of {block}, and this "
            f"model's heads are {cut} wide: use --kv-type f16"
        )
    cells, contexts = _rounded_up(context), [spec]
    if spec.mtp is not None:  # llama.cpp drafts in a context of its own
        contexts.append(replace(spec, layers=(spec.mtp,), mtp=None))
    copies = _DRAFTED_TOKENS if spec.mtp is not None and spec.family.gguf.takes_states_back else 0
    return {
        "weights": file_bytes,
        "kv_cache": sum(_cache_bytes(each, cells, kv_type) for each in contexts) + copies * _state_bytes(spec),
        "compute": sum(_context_bytes(each, cells, kv_type) for each in contexts)
        + (_handed_over_bytes(spec, cells) if spec.mtp is not None else 0)
        + _BYTES_PER_TOKEN_TEXT * spec.vocab_size
        + _LIBRARY_BYTES,
    }


def _cache_bytes(spec: ModelSpec, cells: int, kv_type: str) -> int:
    """Bytes of keys and values, and of recurrent states."""
    cached = sum(_cells(mixer, spec, cells) * mixer.cached_values for mixer in _mixers(spec))
    return int(cached * bytes_per_value(kv_type)) + _state_bytes(spec)


def _state_bytes(spec: ModelSpec) -> int:
    return _FLOAT * sum(mixer.state_values for mixer in _mixers(spec))


def _handed_over_bytes(spec: ModelSpec, cells: int) -> int:
    """Bytes of the hidden states that the model hands to the layer for MTP.

    The model's context keeps those of a batch (``output_reserve`` in src/llama-context.cpp), and they stay alive in its
    graph; so do, in the layer's, those that it is given, the tokens' embeddings, and those that it would hand on.
    """
    return _FLOAT * spec.hidden_size * (_DRAFTING_BATCH + 4 * min(_BATCH, cells))


def _context_bytes(spec: ModelSpec, cells: int, kv_type: str) -> int:
    """Bytes of the buffers of one context, and of its graphs."""
    return (
        _graph_bytes(spec, cells, kv_type)
        + _work_bytes(spec)
        + _FLOAT * spec.vocab_size  # output buffer: logits of one position
        + _BYTES_PER_LAYER_GRAPH * spec.n_layers
        + (_BYTES_OF_DELTA_GRAPHS if _has_delta(spec) else 0)
    )


def _mixers(spec: ModelSpec) -> Iterator[Mixer]:
    return (layer.mixer for layer in spec.layers)


def _has_delta(spec: ModelSpec) -> bool:
    return any(isinstance(mixer, GatedDelta) for mixer in _mixers(spec))


def _cells(mixer: Mixer, spec: ModelSpec, cells: int) -> int:
    """Cells of a layer's cache: only its window and a batch, if some layers have a window and others none.

    See ``llama_kv_cache_iswa`` in ``src/llama-kv-cache-iswa.cpp``. llama.cpp ignores a window that all layers have.
    """
    if mixer.window is None or all(other.window is not None for other in _mixers(spec)):
        return cells
    return min(cells, _rounded_up(mixer.window + _BATCH))


def _rounded_up(n_cells: int) -> int:
    return -(-n_cells // _CONTEXT_STEP) * _CONTEXT_STEP


def _graph_bytes(spec: ModelSpec, cells: int, kv_type: str) -> int:
    """The compute buffer: the largest of the three moments with the most intermediate results."""
    tokens = min(_BATCH, cells)
    hidden = _FLOAT * tokens * spec.hidden_size
    mask = _HALF * tokens * cells
    logits_moment = _FLOAT * tokens * spec.vocab_size + 2 * hidden
    attention_moment = mask + 2 * hidden + max(_mixer_bytes(mixer, tokens, cells, kv_type) for mixer in _mixers(spec))
    feed_forward_moment = mask + 2 * hidden + max(_feed_forward_bytes(layer, tokens) for layer in spec.layers)
    # the allocator leaves gaps: in all known cases up to the size of one hidden state, or of two around states
    gaps = 2 if _has_delta(spec) else 1
    return max(logits_moment, attention_moment, feed_forward_moment) + gaps * hidden


def _mixer_bytes(mixer: Mixer, tokens: int, cells: int, kv_type: str) -> int:
    """Bytes of queries, outputs, keys, values and the converted cache; for a recurrent layer, of its convolution."""
    if isinstance(mixer, GatedDelta):
        # before, padded and after the convolution; or, where queries and keys are repeated for all heads of values
        repeated = 3 * mixer.n_value_heads * mixer.key_dim + 2 * mixer.width
        return _FLOAT * (tokens * max(3 * mixer.channels, repeated) + mixer.state_values)
    if isinstance(mixer, NoMixer):
        return 0
    if isinstance(mixer, Mamba2):
        # what the input matrix makes and the convolution's outputs; beside them values of heads, or of another such
        projected = mixer.sizes["M"]
        return _FLOAT * (tokens * (projected + mixer.channels + max(projected, 3 * mixer.width)) + mixer.state_values)
    if isinstance(mixer, ShortConvolution):
        # gates and values, and their product before and behind the padding
        return _FLOAT * (tokens * 4 * mixer.channels + mixer.state_values)
    # flash attention works on half precision: float32 keys and values are converted whole
    converted = _HALF * cells * mixer.cached_values if kv_type == "f32" else 0
    gates = 2 * mixer.width if isinstance(mixer, GroupedQuery) and mixer.query_has_gates else 0
    return converted + _FLOAT * tokens * (2 * mixer.width + gates + mixer.cached_values)


def _feed_forward_bytes(layer: LayerSpec, tokens: int) -> int:
    """Bytes of the products of each token's experts and of their outputs, and of a shared expert's beside their sum."""
    feed_forward = layer.feed_forward
    if feed_forward is None:
        return 0
    chosen_inner = _FLOAT * tokens * feed_forward.n_active * feed_forward.width
    chosen_outer = _FLOAT * tokens * feed_forward.n_active * layer.expert_size
    shared = layer.routed.shared if layer.routed is not None else None
    of_shared = 0 if shared is None else _FLOAT * tokens * (3 * shared.width + 2 * layer.hidden_size)
    if layer.routed is None or layer.routed.glu.is_gated:
        return max(3 * chosen_inner + chosen_outer, 2 * chosen_outer, of_shared)
    # the ReLU and its square take the place of the products; beside them scores, and what enters and leaves the experts
    beside = _FLOAT * tokens * (4 * layer.n_experts + 2 * layer.expert_size)
    return max(chosen_inner + chosen_outer + beside, 2 * chosen_outer, of_shared)


def _work_bytes(spec: ModelSpec) -> int:
    """Scratch memory of the CPU kernels (``ggml_graph_plan`` in ggml-cpu.c).

    It holds the inputs of a matrix product in the weights' dot-product type, at most 16 bits a value, and for experts
    also the list of rows of each.
    """
    chosen = (layer.feed_forward.n_active * layer.feed_forward.width for layer in spec.layers if layer.feed_forward)
    inputs = max(spec.hidden_size, *(mixer.width for mixer in _mixers(spec)), *chosen)
    row_lists = max(8 * layer.n_experts * layer.top_k for layer in spec.layers)
    return _BATCH * (_HALF * inputs + row_lists)
