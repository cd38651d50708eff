"""Settings of ``config.json`` made of a GGUF file's keys: the inverse of what families write into such files.

llama.cpp's defaults count where a key is absent (``llama_model::load_hparams`` in ``src/llama-model.cpp``). Nothing is
guessed: :class:`~compressors.model.sources.gguf_source.GgufSource` compares the file's keys with those that the family
would write for the model that was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.description.gguf_rope import PLAIN_FACTORS
from compressors.model.description.rope import Rope, RopeKind, attention_multiplier
from compressors.model.errors import UnsupportedError
from compressors.model.families.shared import llama_cpp

__all__ = [
    "SIGMOID",
    "SOFTMAX",
    "attention_settings",
    "dense_width",
    "head_dim",
    "model_settings",
    "n_layers",
    "rope_settings",
    "usual_settings",
    "window_settings",
]

SOFTMAX, SIGMOID = llama_cpp.GATING_FUNCTIONS.values()
"""Values of ``expert_gating_func``."""

_LOW, _HIGH = 1.0, 4.0  # Llama's low_freq_factor and high_freq_factor
_CONTEXTS = range(7, 24)
_ROPE_BASE = 10_000.0  # the default of llama.cpp


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


def head_dim(keys: GgufKeys) -> int:
    """The values of a head."""
    n_heads = keys.count("attention.head_count")
    return keys.count("attention.key_length", keys.count("embedding_length") // max(1, n_heads))


def rope_settings(keys: GgufKeys, width: int) -> dict[str, Any]:
    """The rotary embedding of heads, or parts of heads, of ``width`` values.

    Raises:
        UnsupportedError: its scaling cannot be turned back.
    """
    found: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", _ROPE_BASE)}
    turned = keys.count("rope.dimension_count", width)
    if turned != width:
        found["partial_rotary_factor"] = turned / width
    scaling = _rope_scaling(keys, found["rope_theta"], turned)
    return found if scaling is None else found | {"rope_scaling": scaling}


def _rope_scaling(keys: GgufKeys, theta: float, turned: int) -> Mapping[str, Any] | None:
    """The scaling of the angles by transformers' names; None if there is none."""
    kind = keys.get("rope.scaling.type")
    if keys.has_tensor(PLAIN_FACTORS) and kind in (None, "none"):
        return _llama3(keys, theta, turned)
    if kind in (None, "none"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        return _yarn(keys)
    raise UnsupportedError(
        f"{keys.path}: {keys.architecture}.rope.scaling.type is {kind!r}, which cannot be turned back into the "
        "original's settings: give the original checkpoint"
    )


def _yarn(keys: GgufKeys) -> dict[str, Any]:
    """YaRN; with a logarithm's multiplier, as ``deepseek2`` has it, the file's attention factor is the whole one."""
    factor = keys.number("rope.scaling.factor")
    own, log_multiplier = keys.number("rope.scaling.attn_factor", 1.0), "rope.scaling.yarn_log_multiplier"
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.count("rope.scaling.original_context_length"),
    }
    if log_multiplier in keys:
        return found | {"attention_factor": own, "mscale_all_dim": round(10 * keys.number(log_multiplier), 6)}
    return found | {"attention_factor": attention_multiplier(factor) * own}


def _llama3(keys: GgufKeys, theta: float, turned: int) -> dict[str, Any]:
    """Llama 3's scaling, from the factors that its rule gives.

    Only the ratios of the original context and of the two limits count, and the limits are Llama's in all models: the
    context is the power of two that gives the file's factors.

    Raises:
        UnsupportedError: none does.
    """
    factors = keys.read(PLAIN_FACTORS)
    plain = Rope(RopeKind.DEFAULT, theta, turned)
    for exponent in _CONTEXTS:
        rope = Rope(
            RopeKind.LLAMA3,
            theta,
            turned,
            factor=factors.max().item(),
            original_context=2**exponent,
            low_frequency_factor=_LOW,
            high_frequency_factor=_HIGH,
        )
        found = plain.inverse_frequencies(1) / rope.inverse_frequencies(1)
        if factors.shape == found.shape and torch.allclose(found, factors, rtol=1e-6, atol=0):
            return {**rope.in_config(), "rope_type": "llama3"}
    raise UnsupportedError(
        f"{keys.path}: the factors of the rotary embedding in {PLAIN_FACTORS} are not those of Llama 3's rule, and the "
        "rule that they were made by cannot be told from them: give the original checkpoint"
    )


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
