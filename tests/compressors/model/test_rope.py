"""Rotary embeddings of parts of heads and of kinds of layers, against modules of stock transformers, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig
from transformers.utils import logging

from compressors.model.config.rope_settings import RopeRule, read_rope
from compressors.model.config.settings import Settings
from compressors.model.description.rope import Rope, RopeKind
from compressors.model.errors import InputError, UnsupportedError
from tests.compressors.model.tiny_families import tiny_config

_TRAINED, _HEAD = 2048, 32
_LEFT_OUT = ("rotary_dim", "head_dim")
"""Settings that are not null, but absent, where they are none."""


@dataclass(frozen=True)
class _Case:
    """How a family's file reads its rotary embedding; ``head`` are the values set aside for it."""

    model_type: str
    rule: RopeRule
    settings: dict[str, Any] = field(default_factory=dict)
    head: int = _HEAD


_LATENT = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
_CASES = (
    _Case("qwen2_moe", RopeRule()),
    _Case("gpt_oss", RopeRule(150_000.0), {"rope_parameters": {"rope_type": "default"}}),
    _Case("glm4_moe", RopeRule(default_share=0.5)),
    _Case("qwen3_next", RopeRule(default_share=0.25)),
    _Case("qwen3_5_moe_text", RopeRule(default_share=0.25)),
    _Case("solar_open", RopeRule(1e6, default_share=1.0)),
    _Case("minimax_m2", RopeRule(5e6, default_share=0.75), {"rotary_dim": 24}),
    _Case("deepseek_v2", RopeRule(scales_attention=True, interleaved=True), _LATENT, 16),
    _Case("deepseek_v3", RopeRule(scales_attention=True, interleaved=True), _LATENT, 16),
    _Case("glm4_moe_lite", RopeRule(default_share=1.0, scales_attention=True, interleaved=True), _LATENT, 16),
    _Case("hunyuan_v1_moe", RopeRule(takes_alpha=True)),
)
_ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 512}
_SCALINGS: tuple[dict[str, Any], ...] = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", **_ORIGINAL},
    {"rope_type": "yarn", **_ORIGINAL, "truncate": False, "beta_fast": 20},
    {"rope_type": "yarn", **_ORIGINAL, "mscale": 0.707, "mscale_all_dim": 0.707},
    {"rope_type": "yarn", **_ORIGINAL, "mscale": 1.0, "mscale_all_dim": 0.4},
    {"rope_type": "llama3", **_ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "proportional"},
    {"rope_type": "longrope", **_ORIGINAL},
)
_SHARES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {}),
    ({"partial_rotary_factor": 0.25}, {}),
    ({}, {"partial_rotary_factor": 0.5}),
    ({"partial_rotary_factor": 0.75}, {"partial_rotary_factor": 0.5}),
)
"""Settings of the model, and inside of those of its rotary embedding."""


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    """It warns of most of what is tried here."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity(level)


def _config(case: _Case, settings: dict[str, Any]) -> tuple[PreTrainedConfig, Settings]:
    """The configuration of a file with these settings, and the settings as we read them."""
    sizes = tiny_config(case.model_type, **case.settings).to_dict()
    written = {key: value for key, value in sizes.items() if key not in ("rope_parameters", "partial_rotary_factor")}
    written |= {"max_position_embeddings": _TRAINED, "rotary_dim": None} | case.settings
    written |= {"head_dim": _HEAD if case.head == _HEAD else None} | settings
    written = {key: value for key, value in written.items() if key not in _LEFT_OUT or value is not None}
    config = CONFIG_MAPPING[case.model_type].from_dict(dict(written))
    return config, Settings(written, Path("config.json"))


def _read(case: _Case, settings: Settings) -> Rope:
    return read_rope(settings, case.rule, head_dim=case.head, trained_context=_TRAINED)


def _model(config: PreTrainedConfig) -> nn.Module:
    model: nn.Module = AutoModel.from_config(config)
    return model


def _rotary(model: nn.Module) -> nn.Module:
    (module, *_) = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    return module


def _angles(rope: Rope, n_tokens: int) -> torch.Tensor:
    return torch.arange(n_tokens)[:, None].float() * rope.inverse_frequencies(n_tokens)


def _spellings() -> Iterator[dict[str, Any]]:
    for scaling, (outside, inside) in itertools.product(_SCALINGS, _SHARES):
        yield {"rope_theta": 5e5, "rope_parameters": scaling | inside, **outside}
    yield {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25, "rope_theta": 77.0}}


def _with_factors(case: _Case, settings: dict[str, Any]) -> dict[str, Any]:
    """LongRoPE has a number for each pair that is turned."""
    parameters = settings["rope_parameters"]
    if parameters["rope_type"] != "longrope":
        return settings
    linear = settings | {"rope_parameters": parameters | {"rope_type": "linear"}}
    n_pairs = _read(case, _config(case, linear)[1]).width // 2
    short, long = ([start + step * index for index in range(n_pairs)] for start, step in ((1.0, 0.1), (2.0, 0.5)))
    return settings | {"rope_parameters": parameters | {"short_factor": short, "long_factor": long}}


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.model_type)
def test_angles_are_transformers_to_the_bit(case: _Case) -> None:
    widths = set()
    for settings in _spellings():
        try:
            config, ours = _config(case, _with_factors(case, settings))
            rope = _read(case, ours)
        except UnsupportedError as refused:
            assert "partial_rotary_factor" in str(refused) and case.rule.default_share is None
            continue
        rotary = _rotary(_model(config))
        for n_tokens in (8, 600, _TRAINED if rope.kind is RopeKind.DYNAMIC else 2 * _TRAINED):
            turned = rotary(torch.zeros(1), torch.arange(n_tokens)[None])
            angles = _angles(rope, n_tokens)
            assert torch.equal(rotary.inv_freq, rope.inverse_frequencies(n_tokens)), settings
            assert rotary.attention_scaling == rope.attention_factor
            if not isinstance(turned, tuple):  # deepseek_v2's complex numbers
                assert torch.equal(turned[0], torch.polar(torch.ones_like(angles), angles) * rope.attention_factor)
                continue
            cosine = turned[0].reshape(n_tokens, -1)[:, : rope.width // 2]
            assert torch.equal(cosine, angles.cos() * rope.attention_factor), settings
        assert rope.interleaved == case.rule.interleaved
        widths.add(rope.width)
    assert len(widths) > 1 or case.rule.default_share is None


@pytest.mark.parametrize(
    "case", [case for case in _CASES if case.rule.scales_attention], ids=lambda case: case.model_type
)
def test_products_are_scaled_as_in_latent_attention(case: _Case) -> None:
    scales = set()
    for scaling in _SCALINGS[:7]:
        config, ours = _config(case, {"rope_parameters": scaling})
        rope = _read(case, ours)
        attention = _model(config).layers[0].self_attn
        scales.add(attention.scaling)
        assert rope.attention_scale(24**-0.5) == attention.scaling
    assert len(scales) == 3


def test_a_rule_that_does_not_scale_attention_leaves_it() -> None:
    scaling = {"rope_type": "yarn", **_ORIGINAL, "mscale": 0.707, "mscale_all_dim": 0.707}
    _, ours = _config(_CASES[0], {"rope_parameters": scaling})
    assert _read(_CASES[0], ours).attention_scale(0.25) == 0.25


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.model_type)
def test_what_is_written_out_reads_equal(case: _Case) -> None:
    for settings in _spellings():
        try:
            rope = _read(case, _config(case, _with_factors(case, settings))[1])
        except UnsupportedError:
            continue
        again = {"rope_parameters": rope.in_config(), "rope_scaling": None}
        if rope.share == 1.0 and case.rule.default_share is not None:
            again["rope_parameters"]["partial_rotary_factor"] = 1.0
        assert _read(case, _config(case, again)[1]) == rope


_FULL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
_SLIDING = {"rope_type": "default", "rope_theta": 1e4}
_KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "gemma4_text": {"full_attention": _FULL, "sliding_attention": _SLIDING},
    "mellum": {
        "full_attention": {"rope_type": "yarn", "rope_theta": 5e5, **_ORIGINAL, "truncate": False},
        "sliding_attention": _SLIDING,
    },
    "laguna": {
        "full_attention": {"rope_type": "yarn", "rope_theta": 5e5, "partial_rotary_factor": 0.5, **_ORIGINAL},
        "sliding_attention": _SLIDING | {"partial_rotary_factor": 0.25},
    },
}


@pytest.mark.parametrize("model_type", _KINDS)
def test_kinds_of_layers_have_embeddings_of_their_own(model_type: str) -> None:
    kinds = ["sliding_attention", "full_attention"]
    heads = {"sliding_attention": _HEAD, "full_attention": 64 if model_type == "gemma4_text" else _HEAD}
    config = tiny_config(
        model_type,
        layer_types=kinds,
        head_dim=_HEAD,
        **({"global_head_dim": 64} if model_type == "gemma4_text" else {}),
        max_position_embeddings=_TRAINED,
        rope_parameters=_KINDS[model_type],
    )
    rotary = _rotary(_model(config))
    ours = Settings({"rope_parameters": _KINDS[model_type]}, Path("config.json"))
    for kind in kinds:
        rule = RopeRule(default_share=1.0 if model_type == "laguna" else None, layer_kind=kind)
        rope = read_rope(ours, rule, head_dim=heads[kind], trained_context=_TRAINED)
        assert torch.equal(getattr(rotary, f"{kind}_inv_freq"), rope.inverse_frequencies(600))
        assert getattr(rotary, f"{kind}_attention_scaling") == rope.attention_factor
        cosine, _ = rotary(torch.zeros(1), torch.arange(9)[None], layer_type=kind)
        angles = _angles(rope, 9)
        assert torch.equal(cosine[0], torch.cat((angles, angles), -1).cos() * rope.attention_factor)


@pytest.mark.parametrize(
    ("settings", "rule", "named"),
    [
        ({"full_attention": _SLIDING}, RopeRule(), r"rope_parameters\.full_attention is an object"),
        ({"full_attention": _SLIDING}, RopeRule(layer_kind="sliding_attention"), r"sliding_attention is missing"),
        ({"partial_rotary_factor": 0.1}, RopeRule(default_share=1.0), r"partial_rotary_factor is 0\.1; of heads of 32"),
        ({"partial_rotary_factor": 0.01}, RopeRule(default_share=1.0), r"not a number of pairs"),
        ({"partial_rotary_factor": 2.0}, RopeRule(default_share=1.0), r"not a number of pairs"),
        ({"partial_rotary_factor": None}, RopeRule(default_share=1.0), r"must be a number"),
        ({"rope_type": "proportional", "partial_rotary_factor": 1.5}, RopeRule(), r"partial_rotary_factor"),
        ({"rope_type": "axial"}, RopeRule(), r"rope_type is axial"),
        ({"rope_type": "dynamic", "alpha": 10.0}, RopeRule(), r"factor"),
        ({"rope_type": "yarn", **_ORIGINAL, "mscale_all_dim": "x"}, RopeRule(scales_attention=True), "mscale_all_dim"),
    ],
)
def test_what_cannot_be_turned_is_refused_by_name(settings: dict[str, Any], rule: RopeRule, named: str) -> None:
    ours = Settings({"rope_parameters": settings}, Path("config.json"))
    with pytest.raises(InputError, match=named):
        read_rope(ours, rule, head_dim=_HEAD, trained_context=_TRAINED)


def test_alpha_stretches_the_base_once() -> None:
    case = _CASES[-1]
    config, ours = _config(case, {"rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0}})
    rope = _read(case, ours)
    assert torch.equal(_rotary(_model(config)).inv_freq, rope.inverse_frequencies(2 * _TRAINED))
    assert rope.kind is RopeKind.DEFAULT and rope.theta > 1e6


def test_null_at_the_top_is_a_whole_head() -> None:
    case = _CASES[2]
    config, ours = _config(case, {"partial_rotary_factor": None, "rope_parameters": {"rope_type": "default"}})
    assert _rotary(_model(config)).inv_freq.shape == _read(case, ours).inverse_frequencies(1).shape == (_HEAD // 2,)
