"""Keys of GGUF files, and limits of llama.cpp's graphs, that many families share."""

from __future__ import annotations

from compressors.model.description.family import GgufValue
from compressors.model.description.mixers import GroupedQuery
from compressors.model.description.routing import Score
from compressors.model.description.spec import ModelSpec
from compressors.model.families.shared.parts import grouped_query

__all__ = [
    "GATING_FUNCTIONS",
    "block_count",
    "limit_of_square_attention",
    "limit_of_square_queries",
    "limit_of_untied_head",
    "limit_of_windows",
    "normalization_refusal",
    "usual_keys",
]


GATING_FUNCTIONS = {Score.SOFTMAX: 1, Score.SIGMOID: 2}
"""``llama_expert_gating_func_type`` in llama.cpp's ``src/llama-hparams.h``."""


def block_count(spec: ModelSpec) -> dict[str, GgufValue]:
    """The keys of the number of layers, of which the last may predict one more token."""
    behind: dict[str, GgufValue] = {} if spec.mtp is None else {"nextn_predict_layers": 1}
    return {"block_count": len(spec.blocks), **behind}


def usual_keys(spec: ModelSpec, width_key: str = "feed_forward_length") -> dict[str, GgufValue]:
    """The keys of a model of equal layers with grouped-query attention, under llama.cpp's architecture.

    ``LLM_KV_NAMES`` in ``src/llama-arch.cpp``.

    Args:
        spec: the model as it is written.
        width_key: the key of the width of its feed-forward.
    """
    mixer, feed_forward = grouped_query(spec), spec.layers[0].feed_forward
    assert feed_forward is not None
    values: dict[str, GgufValue] = {
        **block_count(spec),
        "context_length": spec.context_length,
        "embedding_length": spec.hidden_size,
        width_key: feed_forward.width,
        "attention.head_count": mixer.n_heads,
        "attention.head_count_kv": mixer.n_kv_heads,
        "attention.key_length": mixer.head_dim,
        "attention.value_length": mixer.head_dim,
        "attention.layer_norm_rms_epsilon": spec.rms_norm_eps,
    }
    if spec.rope is not None:
        values |= {"rope.freq_base": spec.rope.theta, "rope.dimension_count": spec.rope.width}
    if spec.n_experts:
        values |= {"expert_count": spec.n_experts, "expert_used_count": spec.top_k}
    return values | {"vocab_size": spec.vocab_size}


def normalization_refusal(spec: ModelSpec, *, always: bool) -> str | None:
    """Says that llama.cpp's graph always, or never, normalises, unlike the model."""
    rules = {routed.routing.normalizes for layer in spec.layers if (routed := layer.routed) is not None}
    if rules <= {always}:
        return None
    return (
        f"graph {'always' if always else 'never'} normalises the weights of the chosen experts, but this model "
        f"{'does not' if always else 'does'}"
    )


def limit_of_square_attention(spec: ModelSpec) -> str | None:
    """Says that llama.cpp's graph loads queries and keys only as [D, D], and the model's are of other sizes."""
    for mixer in (grouped_query(spec, index) for index in range(spec.n_layers)):
        if {mixer.n_heads * mixer.head_dim, mixer.n_kv_heads * mixer.head_dim} != {spec.hidden_size}:
            return (
                "graph needs queries and keys as wide as the hidden size; this model has "
                f"{mixer.n_heads} heads and {mixer.n_kv_heads} key-value heads of {mixer.head_dim} at hidden size "
                f"{spec.hidden_size}"
            )
    return None


def limit_of_square_queries(spec: ModelSpec) -> str | None:
    """Says that llama.cpp's graph loads queries only as [D, D], and the model's are of another size."""
    for mixer in (layer.mixer for layer in spec.layers):
        if isinstance(mixer, GroupedQuery) and mixer.n_heads * mixer.head_dim != spec.hidden_size:
            return (
                f"graph needs queries as wide as the hidden size; this model has {mixer.n_heads} heads of "
                f"{mixer.head_dim} at hidden size {spec.hidden_size}"
            )
    return None


def limit_of_windows(spec: ModelSpec) -> str | None:
    """Says that llama.cpp's graph lets every token look at all earlier ones, which a layer of the model does not."""
    windows = [layer.mixer.window for layer in spec.layers if layer.mixer.window is not None]
    if all(window >= spec.context_length for window in windows):
        return None
    return f"graph has no windows, and a layer of this model reaches back over {min(windows)} tokens only"


def limit_of_untied_head(spec: ModelSpec) -> str | None:
    """Says that llama.cpp's graph loads no file without a head of its own."""
    if not spec.tied_embeddings:
        return None
    return "graph needs a head of its own, but this model's is tied to the embedding"
