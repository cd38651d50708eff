"""Settings of ``config.json`` made of a GGUF file's keys: the inverse of what families write into such files.

llama.cpp's defaults count where a key is absent (``llama_model::load_hparams`` in ``src/llama-model.cpp``). Nothing is
guessed: :class:`~compressors.model.sources.gguf_source.GgufSource` compares the file's keys with those that the family
would write for the model that was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.gguf_rope_settings import rope_settings
from compressors.model.description.tensors import TensorSpec
from compressors.model.families.shared import llama_cpp

__all__ = [
    "SIGMOID",
    "SOFTMAX",
    "attention_of_some_layers",
    "attention_settings",
    "dense_width",
    "has",
    "head_dim",
    "model_settings",
    "n_layers",
    "usual_settings",
    "window_settings",
]

SOFTMAX, SIGMOID = llama_cpp.GATING_FUNCTIONS.values()
"""Values of ``expert_gating_func``."""


def usual_settings(
    keys: GgufKeys,
    *,
    n_experts: str,
    width: str,
    width_key: str = "expert_feed_forward_length",
    top_k: str = "num_experts_per_tok",
    epsilon: str = "rms_norm_eps",
) -> dict[str, Any]:
    """The settings of a model with grouped-query attention and experts in its layers.

    Args:
        keys: the file's.
        n_experts: transformers' key of the number of experts.
        width: transformers' key of their width.
        width_key: llama.cpp's key of their width.
        top_k: transformers' key of the number of experts of a token.
        epsilon: transformers' key of the epsilon of norms.
    """
    return {
        **model_settings(keys, epsilon),
        **attention_settings(keys),
        **rope_settings(keys, head_dim(keys)),
        n_experts: keys.count("expert_count"),
        top_k: keys.count("expert_used_count"),
        width: keys.count(width_key),
    }


def model_settings(keys: GgufKeys, epsilon: str = "rms_norm_eps") -> dict[str, Any]:
    """The settings of a model apart from its mixers and experts; ``epsilon`` is the key of the epsilon of norms."""
    embedding = keys.shapes.get("token_embd.weight", (0,))
    return {
        "num_hidden_layers": n_layers(keys),
        "hidden_size": keys.count("embedding_length"),
        "vocab_size": embedding[0],
        "max_position_embeddings": keys.count("context_length"),
        epsilon: keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not keys.has_tensor("output.weight"),
        "hidden_act": "silu",
    }


def has(keys: GgufKeys, tensors: Sequence[TensorSpec]) -> bool:
    """True if the file has such tensors in a layer."""
    return keys.has_tensor(tensors[0].gguf.name)


def n_layers(keys: GgufKeys) -> int:
    """The number of layers, without those for predicting several tokens at once."""
    return keys.count("block_count") - keys.count("nextn_predict_layers", 0)


def attention_settings(keys: GgufKeys) -> dict[str, Any]:
    """The sizes of grouped-query attention."""
    n_heads = keys.count("attention.head_count")
    return {
        "num_attention_heads": n_heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", n_heads),
        "head_dim": head_dim(keys),
    }


def attention_of_some_layers(keys: GgufKeys) -> tuple[dict[str, Any], tuple[bool, ...]]:
    """The sizes of grouped-query attention, and whether each layer attends: the others have no key-value heads."""
    counts = keys.by_layer("attention.head_count_kv", n_layers(keys))
    sizes = {
        "num_attention_heads": keys.count("attention.head_count"),
        "num_key_value_heads": max(counts, default=0),
        "head_dim": head_dim(keys),
    }
    return sizes, tuple(count > 0 for count in counts)


def head_dim(keys: GgufKeys) -> int:
    """The values of a head."""
    n_heads = keys.count("attention.head_count")
    return keys.count("attention.key_length", keys.count("embedding_length") // max(1, n_heads))


def window_settings(keys: GgufKeys, pattern: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The window, and the kind of each layer; ``pattern`` says which layers have one where the file does not."""
    layers = n_layers(keys)
    if pattern is None or "attention.sliding_window_pattern" in keys:
        pattern = keys.by_layer("attention.sliding_window_pattern", layers)
    return {
        "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if has_window else "full_attention" for has_window in pattern],
    }


def dense_width(keys: GgufKeys) -> dict[str, Any]:
    """The width of leading dense layers; none where there are no such layers."""
    return (
        {"intermediate_size": keys.count("feed_forward_length")} if keys.count("leading_dense_block_count", 0) else {}
    )
