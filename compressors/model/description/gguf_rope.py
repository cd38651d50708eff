"""A rotary embedding as llama.cpp computes it from a file: keys, and factors for the architectures that take them.

``ggml_rope_cache_init`` and ``rope_yarn`` in ``ggml/src/ggml-cpu/ops.cpp``; ``llama_context`` in
``src/llama-context.cpp``, which for YaRN puts its own attention factor in place of every other and multiplies it by
``rope.scaling.attn_factor``; ``kq_scale`` in ``src/models/deepseek2.cpp``; ``get_rope_factors`` in
``src/llama-model.cpp``. Keys are those of ``LLM_KV_NAMES`` in ``src/llama-arch.cpp`` without the architecture. Base and
width (``rope.freq_base``, ``rope.dimension_count``) are the family's; every graph fixes which values form a pair.
(llama.cpp also knows ``rope.scaling.yarn_beta_fast`` and ``..._slow``, but no architecture that we write reads them:
32 and 1 are constants in their graphs. Where no factors can make up for that, the file is written all the same, and
:func:`yarn_constants` says so.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from compressors.model.description.rope import Rope, RopeKind, attention_multiplier
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError

__all__ = ["LONG_FACTORS", "PLAIN_FACTORS", "SHORT_FACTORS", "SWITCH"]
__all__ += ["GgufRope", "gguf_rope", "gguf_rope_of", "yarn_constants"]

PLAIN_FACTORS, LONG_FACTORS, SHORT_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
SWITCH = "rope.scaling.finetuned"
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # constants of llama.cpp's graphs
_STILL = 1e30  # llama.cpp's converter divides by it where a pair is not turned
_SAME = 1e-5  # relative; llama.cpp computes its frequencies in float32, by repeated multiplication


@dataclass(frozen=True)
class GgufRope:
    """The keys and tensors of a file that describe its rotary embedding."""

    keys: Mapping[str, str | int | float] = field(default_factory=dict)
    factors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by tensor name; angles are divided by them


def gguf_rope_of(spec: ModelSpec) -> GgufRope:
    """Returns the keys and tensors that a model's file needs, as :func:`gguf_rope` does.

    Where layers differ, these are for layers that reach back over all tokens, and the others must need none: llama.cpp
    knows another base for them (``rope.freq_base_swa``), and nothing more. Where no layer turns anything, only a switch
    is needed, which some architectures have.
    """
    gguf = spec.written.family.gguf
    switch = {SWITCH: bool(spec.ropes)} if gguf.switches_rope else {}
    if not spec.ropes:
        return GgufRope(switch)
    main, *others = (
        gguf_rope(
            rope,
            gguf.architecture,
            takes_factors=gguf.takes_rope_factors and number == 0,
            scales_attention=gguf.scales_attention,
        )
        for number, rope in enumerate(spec.ropes)
    )
    if any(other != GgufRope() for other in others) or (others and main.keys):
        kinds = " and ".join(rope.kind.value for rope in spec.ropes)
        raise UnsupportedError(
            f"llama.cpp's {gguf.architecture} graph cannot turn by the angles of rope_type {kinds} in layers of "
            "different kinds, which the model was trained with: it cannot be written as GGUF"
        )
    return replace(main, keys={**switch, **main.keys})


def gguf_rope(rope: Rope, architecture: str, *, takes_factors: bool, scales_attention: bool = False) -> GgufRope:
    """Returns the keys and tensors that a file of this architecture needs, except base and width.

    Args:
        rope: the model's rotary embedding.
        architecture: llama.cpp's name of the architecture.
        takes_factors: its graph divides the angles by a tensor of the file.
        scales_attention: its graph multiplies the products of queries and keys for a longer context, as
            ``deepseek2``'s does.

    Raises:
        UnsupportedError: llama.cpp would compute other angles whatever the file says.
    """
    written = _written(rope, takes_factors=takes_factors, scales_attention=scales_attention)
    if written is None:
        raise UnsupportedError(
            f"llama.cpp's {architecture} graph cannot turn by the angles of rope_type {rope.kind.value!r}, which the "
            "model was trained with: it cannot be written as GGUF"
        )
    return written


def yarn_constants(rope: Rope, *, takes_factors: bool) -> str | None:
    """Says how llama.cpp's angles differ where its graph has constants for YaRN's settings; None if they do not.

    Other betas moved the predictions of the trained toys by 0.003 to 0.01 nats (docs/settings.md).
    """
    if rope.kind is not RopeKind.YARN or takes_factors or _computes_yarn(rope):
        return None
    return (
        f"llama.cpp turns by YaRN with beta_fast {_BETA_FAST:g}, beta_slow {_BETA_SLOW:g} and truncate true, whatever "
        f"a file says; the original's are {rope.beta_fast:g}, {rope.beta_slow:g} and {str(rope.truncate).lower()}"
    )


def _written(rope: Rope, *, takes_factors: bool, scales_attention: bool) -> GgufRope | None:
    corrections = _of_attention(rope) if scales_attention else _of_cosines(rope)
    if corrections is None:
        return None
    if rope.kind in (RopeKind.DEFAULT, RopeKind.DYNAMIC):  # dynamic scaling begins beyond the trained context
        return GgufRope() if rope.attention_scale(1.0) == 1.0 else None
    if rope.kind is RopeKind.LINEAR:
        return GgufRope({"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor, **corrections})
    if rope.kind is RopeKind.YARN and (_computes_yarn(rope) or not takes_factors):
        yarn: dict[str, str | int | float] = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.factor,
            "rope.scaling.original_context_length": rope.original_context,
        }
        return GgufRope(yarn | corrections)
    if not takes_factors:
        return None
    if rope.kind is RopeKind.LONGROPE:
        kind: dict[str, str | int | float] = {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": rope.original_context,
        }
        factors = {LONG_FACTORS: rope.long_factors, SHORT_FACTORS: rope.short_factors}
        return GgufRope(kind | _attention_factor(rope.attention_factor), factors)
    return GgufRope(_attention_factor(rope.attention_factor), {PLAIN_FACTORS: _factors(rope)})


def _factors(rope: Rope) -> tuple[float, ...]:
    plain = replace(rope, kind=RopeKind.DEFAULT)
    factors = plain.inverse_frequencies(1) / rope.inverse_frequencies(1)
    written: list[float] = factors.nan_to_num(posinf=_STILL).tolist()
    return tuple(written)


def _of_cosines(rope: Rope) -> dict[str, float]:
    """The correction of cosine and sine; under YaRN llama.cpp multiplies them by 1 + 0.1 ln(factor) by itself."""
    if rope.kind is not RopeKind.YARN:
        return {}
    return _attention_factor(rope.attention_factor / attention_multiplier(rope.factor))


def _of_attention(rope: Rope) -> dict[str, float] | None:
    """The correction for ``deepseek2``'s graph, which corrects the products of queries and keys, too; None: no key can.

    Let the file have an attention factor a and a logarithm's multiplier l, m(l) = 1 + l ln(factor), and m = m(0.1).
    Under YaRN the graph multiplies cosine and sine by a, and products by (a m(l))^2; without l, by a m and by (a m)^2.
    Under linear scaling it multiplies cosine and sine by a, and products by (a m m(l))^2; m(l) is 1 without l. Factors
    below 1 have logarithms below 0 there; only YaRN without l takes m as 1 then.
    """
    products = math.sqrt(rope.attention_scale(1.0))
    if rope.kind not in (RopeKind.LINEAR, RopeKind.YARN):
        return {}
    is_linear = rope.kind is RopeKind.LINEAR
    without = 0.1 * math.log(rope.factor) + 1.0 if is_linear else rope.attention_factor
    if math.isclose(products, without, rel_tol=1e-9):
        return _of_cosines(rope)
    if rope.factor == 1:
        return None
    multiplier = (products / without - 1) / math.log(rope.factor)
    if without == 1.0:  # the same, but not rounded
        multiplier = 0.1 * rope.all_dim_multiplier
    cosines = {} if is_linear else _attention_factor(rope.attention_factor)
    return {"rope.scaling.yarn_log_multiplier": multiplier, **cosines}


def _attention_factor(factor: float) -> dict[str, float]:
    return {} if math.isclose(factor, 1.0, rel_tol=1e-9) else {"rope.scaling.attn_factor": factor}


def _computes_yarn(rope: Rope) -> bool:
    """Whether ``ggml_rope_yarn_corr_dims`` and ``rope_yarn_ramp``, which always truncate, give these angles."""
    import torch

    half = rope.width // 2
    plain = replace(rope, kind=RopeKind.DEFAULT).inverse_frequencies(1).double()

    def dimension(n_rotations: float) -> float:
        turns = math.log(rope.original_context / (n_rotations * 2 * math.pi))
        return rope.width * turns / (2 * math.log(rope.theta))

    low = max(0, math.floor(dimension(_BETA_FAST)))
    high = min(rope.width - 1, math.ceil(dimension(_BETA_SLOW)))
    ramp = 1 - ((torch.arange(half) - low) / max(0.001, high - low)).clamp(0, 1)
    found = plain / rope.factor * (1 - ramp) + plain * ramp
    return torch.allclose(found, rope.inverse_frequencies(1).double(), rtol=_SAME, atol=0)
