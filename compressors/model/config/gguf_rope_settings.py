"""Settings of a rotary embedding made of a GGUF file's keys and factors.

It is the inverse of :mod:`compressors.model.description.gguf_rope`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.description.gguf_rope import PLAIN_FACTORS, SWITCH
from compressors.model.description.rope import Rope, RopeKind, attention_multiplier
from compressors.model.errors import UnsupportedError

__all__ = ["is_turned", "rope_settings"]

_LOW, _HIGH = 1.0, 4.0  # Llama's low_freq_factor and high_freq_factor
_CONTEXTS = range(7, 24)
_ROPE_BASE = 10_000.0  # the default of llama.cpp


def is_turned(keys: GgufKeys) -> bool:
    """True if queries and keys are turned, as they are where no key says so."""
    return keys.flag(SWITCH, default=True)


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
    import torch

    factors = torch.from_numpy(keys.read(PLAIN_FACTORS))
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
        if factors.shape == found.shape and found.allclose(factors, rtol=1e-6, atol=0):
            return {**rope.in_config(), "rope_type": "llama3"}
    raise UnsupportedError(
        f"{keys.path}: the factors of the rotary embedding in {PLAIN_FACTORS} are not those of Llama 3's rule, and the "
        "rule that they were made by cannot be told from them: give the original checkpoint"
    )
