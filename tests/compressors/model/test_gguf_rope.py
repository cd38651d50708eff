"""Keys and factors of GGUF files, put into llama.cpp's formulas: cosines, angles and products are the model's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from compressors.model.description.gguf_rope import PLAIN_FACTORS, GgufRope, gguf_rope, yarn_constants
from compressors.model.description.rope import Rope, RopeKind, attention_multiplier
from compressors.model.errors import UnsupportedError

_LINEAR = Rope(RopeKind.LINEAR, theta=1e4, width=64, factor=4.0)
_YARN = Rope(
    RopeKind.YARN,
    theta=1e4,
    width=64,
    factor=40.0,
    original_context=4096,
    attention_factor=attention_multiplier(40.0),
)
_PROPORTIONAL = Rope(RopeKind.PROPORTIONAL, theta=1e6, width=64, share=0.25)


@dataclass(frozen=True)
class _Computed:
    """llama.cpp's factors beside the angles: of cosine and sine, and of products of queries and keys."""

    cosine: float
    products: float


def _by_llama_cpp(written: GgufRope, *, scales_attention: bool) -> _Computed:
    """llama-context.cpp from line 173 on, ``rope_yarn`` of ops.cpp, and deepseek2.cpp's ``kq_scale``."""
    keys: Any = written.keys
    log_factor = math.log(keys.get("rope.scaling.factor", 1.0))
    log_multiplier = keys.get("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
    is_yarn, attention = keys.get("rope.scaling.type") == "yarn", 1.0
    if is_yarn:
        attention = 1.0 if log_multiplier else 1 + 0.1 * max(0.0, log_factor)
        attention /= 1 + 0.1 * log_factor
    attention *= keys.get("rope.scaling.attn_factor", 1.0)
    cosine = attention * (1 + 0.1 * log_factor) if is_yarn else attention
    products = attention * (1 + 0.1 * log_factor) * (1 + 0.1 * log_multiplier * log_factor)
    return _Computed(cosine, products**2 if scales_attention else 1.0)


_SCALED = {
    "linear": _LINEAR,
    "linear, mscale_all_dim": replace(_LINEAR, all_dim_multiplier=0.7),
    "yarn": _YARN,
    "yarn, equal multipliers": replace(_YARN, attention_factor=1.0, all_dim_multiplier=0.707),
    "yarn, 1 and 1": replace(_YARN, attention_factor=1.0, all_dim_multiplier=1.0),
    "yarn, unequal multipliers": replace(
        _YARN,
        attention_factor=attention_multiplier(40.0) / attention_multiplier(40.0, 0.4),
        all_dim_multiplier=0.4,
    ),
    "yarn, equal corrections": replace(_YARN, attention_factor=attention_multiplier(40.0, 0.5), all_dim_multiplier=0.5),
    "yarn, a factor of its own": replace(_YARN, attention_factor=1.3),
    "linear, closer together": replace(_LINEAR, factor=0.5, all_dim_multiplier=0.7),
    "yarn, closer together": replace(_YARN, factor=0.5, attention_factor=1.0, all_dim_multiplier=0.7),
    "yarn, closer together, a factor of its own": replace(_YARN, factor=0.5, attention_factor=1.3),
    "yarn, no longer": replace(_YARN, factor=1.0, attention_factor=1.0, all_dim_multiplier=1.0),
}


@pytest.mark.parametrize("name", _SCALED)
def test_latent_attention_is_corrected_as_in_the_model(name: str) -> None:
    rope = _SCALED[name]
    written = gguf_rope(rope, "deepseek2", takes_factors=False, scales_attention=True)
    found = _by_llama_cpp(written, scales_attention=True)
    assert found.cosine == pytest.approx(rope.attention_factor, rel=1e-9)
    assert found.products == pytest.approx(rope.attention_scale(1.0), rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "yarn", "yarn, a factor of its own"])
def test_other_attention_has_no_keys_for_products(name: str) -> None:
    rope = _SCALED[name]
    written = gguf_rope(rope, "qwen3moe", takes_factors=False)
    assert "rope.scaling.yarn_log_multiplier" not in written.keys
    assert _by_llama_cpp(written, scales_attention=False).cosine == pytest.approx(rope.attention_factor, rel=1e-9)


def test_deepseeks_multiplier_is_written_as_the_converter_does() -> None:
    """``conversion/deepseek.py`` writes a tenth of mscale_all_dim and no attention factor."""
    written = gguf_rope(_SCALED["yarn, equal multipliers"], "deepseek2", takes_factors=False, scales_attention=True)
    assert written.keys == {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_log_multiplier": 0.1 * 0.707,
    }


def test_an_unscaled_context_cannot_have_scaled_products() -> None:
    rope = Rope(RopeKind.DYNAMIC, theta=1e4, width=64, factor=4.0, trained_context=512)
    assert gguf_rope(rope, "deepseek2", takes_factors=False, scales_attention=True) == GgufRope()
    with pytest.raises(UnsupportedError, match="deepseek2 graph cannot turn by the angles of rope_type 'dynamic'"):
        gguf_rope(replace(rope, all_dim_multiplier=1.0), "deepseek2", takes_factors=False, scales_attention=True)


def test_without_a_longer_context_no_key_tells_cosines_and_products_apart() -> None:
    rope = replace(_YARN, factor=1.0, attention_factor=1.3)
    with pytest.raises(UnsupportedError, match="deepseek2 graph cannot turn by the angles of rope_type 'yarn'"):
        gguf_rope(rope, "deepseek2", takes_factors=False, scales_attention=True)
    assert gguf_rope(rope, "qwen3moe", takes_factors=False).keys["rope.scaling.attn_factor"] == 1.3


def test_pairs_that_stay_are_divided_by_a_large_number() -> None:
    """llama.cpp divides each angle by its factor; ``conversion/gemma.py`` writes 1 and 1e30."""
    written = gguf_rope(_PROPORTIONAL, "gemma4", takes_factors=True)
    factors = torch.tensor(written.factors[PLAIN_FACTORS], dtype=torch.float64)
    assert not written.keys and factors.tolist() == [1.0] * 8 + [pytest.approx(1e30)] * 24
    plain = replace(_PROPORTIONAL, kind=RopeKind.DEFAULT).inverse_frequencies(1)
    assert torch.allclose(plain / factors, _PROPORTIONAL.inverse_frequencies(1).double(), atol=1e-20)
    with pytest.raises(UnsupportedError, match="'proportional'"):
        gguf_rope(_PROPORTIONAL, "qwen3moe", takes_factors=False)


def test_the_width_of_the_turned_part_bounds_yarn() -> None:
    """A constant of the graphs is said, not refused: for a part of a head the dimensions are those of the part."""
    for width in (16, 32, 64):
        rope = replace(_YARN, width=width)
        assert yarn_constants(rope, takes_factors=False) is None
        constants = yarn_constants(replace(rope, truncate=False), takes_factors=False)
        assert constants is not None and "truncate true" in constants and "false" in constants
