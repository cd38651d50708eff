"""The numbers that a file's metadata must hold for llama.cpp to compute what ``config.json`` describes.

llama.cpp takes every number of its graph from the file (``llama_model::load_hparams``). If a key is wrong, missing or
superfluous, another model loads without a warning. Keys that only describe the file are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from compressors.model.description.family import GgufValue
from compressors.model.description.gguf_rope import GgufRope, gguf_rope_of
from compressors.model.description.onnx_cache import Attention
from compressors.model.description.routing import Score
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError

__all__ = ["MetadataValue", "expected_rope", "gguf_setting_symptoms"]

MetadataValue = GgufValue

_LLAMA_CPP_ROPE_BASE = 10000.0  # the default if the file says nothing
_GATING_FUNCTIONS = {Score.SOFTMAX: 1, Score.SIGMOID: 2, Score.LOGITS: 3}
"""Values of expert_gating_func (``llama_expert_gating_func_type`` in ``src/llama-hparams.h``)."""


_RECURRENT = "attention.recurrent_layers"

_NEUTRAL: Mapping[str, tuple[MetadataValue, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.group_norm_groups": (0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.type": ("none",),
    "use_parallel_residual": (False,),
}
"""Keys that models of our families do not need, with the values that change nothing."""

_READ_ALWAYS = (
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
)
_DESCRIPTIVE = (
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",  # read by other architectures only
    "rope.scaling.yarn_beta_slow",
    "tensor_data_layout",
)

_OF_ANGLES = ("rope.freq_base", "rope.dimension_count")
"""Keys that change nothing in a model that turns nothing."""

_NAMES: Mapping[str, str] = {
    "attention.layer_norm_rms_epsilon": "epsilon of the norms",
    "expert_used_count": "number of experts per token",
    "rope.freq_base": "rope base (position-dependent: every rotation is another)",
}


def expected_rope(spec: ModelSpec) -> GgufRope | None:
    """The keys and tensors a file needs for the rotary embedding; None if llama.cpp cannot compute it at all."""
    try:
        return gguf_rope_of(spec)
    except UnsupportedError:
        return None


def gguf_setting_symptoms(metadata: Mapping[str, MetadataValue], spec: ModelSpec) -> list[str]:
    """Lists the settings of a GGUF file that do not fit this model: a sentence for each key.

    A file that was made from it, or from which it was read, has none.
    """
    architecture = spec.written.family.gguf.architecture
    found = metadata.get("general.architecture", "")
    if found != architecture:
        return [f"general.architecture: {found!r} in the file, but the model is llama.cpp's {architecture!r}"]
    prefix = f"{architecture}."
    settings = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if _is_only_longer(settings.get("context_length"), spec):
        settings["context_length"] = spec.context_length
    _put_list_for_interval(settings)
    symptoms = [
        f"{_NAMES.get(key, key)}: {_shown(settings.get(key))} in the file, {_shown(wanted)} in config.json"
        for key, wanted, default in _expected(spec)
        if not _is_same(settings.get(key, default), wanted)
    ]
    return [*symptoms, *_unexpected(settings, spec)]


def _put_list_for_interval(settings: dict[str, MetadataValue]) -> None:
    """Puts the list of recurrent layers in the place of an interval, which llama.cpp takes only without a list."""
    interval, n_layers = settings.pop("full_attention_interval", None), settings.get("block_count")
    if isinstance(interval, int) and interval > 0 and isinstance(n_layers, int) and _RECURRENT not in settings:
        settings[_RECURRENT] = tuple((index + 1) % interval != 0 for index in range(n_layers))


def _is_only_longer(context_length: MetadataValue | None, spec: ModelSpec) -> bool:
    """True for a context beyond a window, or beyond what a model was trained on that turns nothing: it does no harm."""
    if spec.ropes:
        return context_length in {rope.trained_context for rope in spec.ropes}
    return isinstance(context_length, int) and context_length > spec.context_length


def _expected(spec: ModelSpec) -> Iterator[tuple[str, MetadataValue, MetadataValue | None]]:
    """Yields keys with the model's value, and llama.cpp's default for an absent key (None: it refuses to load)."""
    written = spec.written
    keys = dict(written.family.gguf.keys(written))
    n_heads = keys.get("attention.head_count")
    width_of_head = spec.hidden_size // n_heads if isinstance(n_heads, int) and n_heads else None
    absent: dict[str, MetadataValue | None] = {
        "attention.head_count_kv": n_heads,
        "attention.key_length": width_of_head,
        "attention.value_length": width_of_head,
        "rope.freq_base": _LLAMA_CPP_ROPE_BASE,
        "rope.dimension_count": keys.get("attention.key_length", width_of_head),
        "expert_count": 0,
        "expert_used_count": 0,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        **written.family.gguf.absent(written),
    }
    for key, value in keys.items():
        if key != "vocab_size":  # the vocabulary itself decides
            yield key, value, absent.get(key)
    rope = expected_rope(spec)
    for key, value in ({} if rope is None else rope.keys).items():
        yield key, value, 1.0 if key == "rope.scaling.attn_factor" else None


def _unexpected(settings: Mapping[str, MetadataValue], spec: ModelSpec) -> Iterator[str]:
    """Yields keys that this model does not have, unless their value changes nothing."""
    known = {key for key, _, _ in _expected(spec)}
    allowed = {**_NEUTRAL, **_described(spec)}
    is_dense = not spec.written.n_experts
    scaling_is_off = settings.get("rope.scaling.type", "none") == "none"
    for key, value in settings.items():
        if key in known or key in _DESCRIPTIVE or (key == "feed_forward_length" and not is_dense):
            continue
        if expected_rope(spec) is None and key.startswith("rope.scaling."):
            continue
        if spec.rope is None and key in _OF_ANGLES:
            continue
        if scaling_is_off and key.startswith("rope.scaling.") and key not in _READ_ALWAYS:
            continue
        if key not in allowed:
            yield f"{key}: {_shown(value)} in the file, and the model has no such setting"
        elif not any(_is_same(value, neutral) for neutral in allowed[key]):
            wanted = _shown(allowed[key][-1])
            yield f"{key}: {_shown(value)} in the file, where the model's computation needs {wanted} or no such key"


def _described(spec: ModelSpec) -> dict[str, tuple[MetadataValue, ...]]:
    """Keys that repeat facts of the model, with the values that change nothing."""
    scales = {layer.mixer.scale for layer in spec.layers if isinstance(layer.mixer, Attention)}
    rules = {layer.routed.routing for layer in spec.layers if layer.routed is not None}
    described: dict[str, tuple[MetadataValue, ...]] = {
        "attention.sliding_window": (0, spec.window or 0),
        "vocab_size": (spec.vocab_size,),
    }
    if len(scales) == 1:
        described["attention.scale"] = (0.0, scales.pop())
    if len(rules) == 1:
        rule = rules.pop()
        described["expert_gating_func"] = (0, _GATING_FUNCTIONS[rule.score])
        described["expert_weights_norm"] = (rule.normalizes,)
    if not spec.written.n_experts:
        described |= {"expert_count": (0,), "expert_used_count": (0,)}
    return described


def _is_same(found: Any, wanted: MetadataValue) -> bool:
    """Compares numbers as llama.cpp keeps them: floats in float32; one number equals an array of it for each layer."""
    if isinstance(found, tuple) and not isinstance(wanted, tuple):
        return bool(found) and all(_is_same(item, wanted) for item in found)
    if isinstance(wanted, tuple) and not isinstance(found, tuple):
        return bool(wanted) and all(_is_same(found, item) for item in wanted)
    if isinstance(wanted, str | tuple) or isinstance(found, str | tuple) or found is None:
        return bool(found == wanted)
    if isinstance(wanted, float) or isinstance(found, float):
        return bool(np.float32(found) == np.float32(wanted))
    return bool(found == wanted)


def _shown(value: MetadataValue | None) -> str:
    if value is None:
        return "absent"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    if isinstance(value, bool | str):
        return repr(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 1 and value == round(value) else f"{value:.6g}"
