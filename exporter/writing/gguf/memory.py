"""The memory that llama.cpp takes to run a file on the CPU, known before the file is written.

An upper bound for stock settings: batches of 512 tokens, one sequence, weights mapped, flash attention left to
llama.cpp, which turns it on. The formulas were fitted to the buffers that llama.cpp reports for six shapes, real
models among them, contexts from 512 to 32768 tokens and three cache types; what is beside the buffers (the last two
terms of ``compute``) to resident set sizes.
"""

from __future__ import annotations

from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.kv_types import KV_TYPES, bytes_per_value, values_per_block

__all__ = ["predict_runtime_bytes"]

_BATCH = 512  # n_batch and n_ubatch
_CONTEXT_STEP = 256  # contexts are rounded up to it (llama_context in src/llama-context.cpp)
_FLOAT = 4
_HALF = 2
_BYTES_PER_TOKEN_TEXT = 420  # a token's text, score and merge in llama_vocab's tables
_BYTES_PER_LAYER_GRAPH = 100 << 10  # about 100 graph nodes, in two graphs and in the scheduler's tables
_LIBRARY_BYTES = 5 << 20  # pages of the libraries that are touched only when a model runs


def predict_runtime_bytes(spec: ModelSpec, file_bytes: int, context: int, kv_type: str) -> dict[str, int]:
    """Bytes by purpose: ``weights``, ``kv_cache`` and ``compute``; the runtime's own base comes on top.

    Raises:
        InputError: there is no such cache type.
        UnsupportedError: a head of the model is no multiple of the type's blocks.
    """
    if kv_type not in KV_TYPES:
        raise InputError(f"--kv-type {kv_type}: no such type; choose one of {', '.join(KV_TYPES)}")
    block = values_per_block(kv_type)  # a head must be whole blocks (llama_init_from_model in src/llama-context.cpp)
    if spec.head_dim % block:
        raise UnsupportedError(
            f"--kv-type {kv_type}: llama.cpp stores such keys and values in blocks of {block}, and this "
            f"model's heads are {spec.head_dim} wide: use --kv-type f16"
        )
    cells = -(-context // _CONTEXT_STEP) * _CONTEXT_STEP
    key_value = 2 * spec.n_kv_heads * spec.head_dim  # values cached for a token in a layer
    compute = (
        _graph_bytes(spec, cells, kv_type)
        + _work_bytes(spec)
        + _FLOAT * spec.vocab_size  # output buffer: logits of one position
        + _BYTES_PER_TOKEN_TEXT * spec.vocab_size
        + _BYTES_PER_LAYER_GRAPH * spec.n_layers
        + _LIBRARY_BYTES
    )
    return {
        "weights": file_bytes,
        "kv_cache": int(spec.n_layers * cells * key_value * bytes_per_value(kv_type)),
        "compute": compute,
    }


def _graph_bytes(spec: ModelSpec, cells: int, kv_type: str) -> int:
    """The compute buffer: the largest of three moments at which most intermediate results are alive at once."""
    tokens = min(_BATCH, cells)
    hidden = _FLOAT * tokens * spec.hidden_size
    query = _FLOAT * tokens * spec.n_heads * spec.head_dim
    key_value = 2 * _FLOAT * tokens * spec.n_kv_heads * spec.head_dim
    chosen_inner = _FLOAT * tokens * spec.top_k * spec.expert_width
    chosen_outer = _FLOAT * tokens * spec.top_k * spec.hidden_size
    mask = _HALF * tokens * cells
    # flash attention works on half precision: float32 keys and values are converted whole
    converted = _HALF * 2 * cells * spec.n_kv_heads * spec.head_dim if kv_type == "f32" else 0
    logits_moment = _FLOAT * tokens * spec.vocab_size + 2 * hidden
    attention_moment = mask + converted + 2 * hidden + 2 * query + key_value
    experts_moment = mask + 2 * hidden + max(3 * chosen_inner + chosen_outer, 2 * chosen_outer)
    # the allocator leaves gaps, up to the size of one hidden state in all cases that were seen
    return max(logits_moment, attention_moment, experts_moment) + hidden


def _work_bytes(spec: ModelSpec) -> int:
    """Scratch memory of the CPU kernels (``ggml_graph_plan`` in ggml-cpu.c).

    Inputs of a matrix product in the weights' dot-product type, at most 16 bits a value; for experts also the list of
    rows of each.
    """
    inputs = max(spec.hidden_size, spec.n_heads * spec.head_dim, spec.top_k * spec.expert_width)
    row_lists = 8 * spec.n_experts * spec.top_k
    return _BATCH * (_HALF * inputs + row_lists)
