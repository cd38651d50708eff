"""The peculiarities of gpt-oss: its configuration on the hub, and the constants of llama.cpp's graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressors.model.config.config_check import check_against_transformers
from compressors.model.config.reading import read_spec
from compressors.model.description.gguf_rope import yarn_constants
from compressors.model.description.rope import RopeKind
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from exporter.writing.gguf.layout import plan_tensors

_HUB: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "pad_token_id": 199999,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
"""The configuration of gpt-oss-20b, by the fields of transformers' class."""


def _read(folder: Path, **changes: Any) -> ModelSpec:
    config = {key: value for key, value in (_HUB | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    spec = read_spec(folder)
    check_against_transformers(config, folder, spec)
    return spec


def test_the_hub_s_configuration(tmp_path: Path) -> None:
    spec = _read(tmp_path)
    assert [layer.mixer.window for layer in spec.layers] == [128, None] * 12
    assert spec.context_length == 131072
    assert (spec.rope.theta, spec.rope.factor, spec.rope.truncate) == (150000, 32, False)
    assert 20e9 < spec.parameters < 21e9


def test_llama_cpp_s_deviation_is_said(tmp_path: Path) -> None:
    """Its angles are those of whole dimensions; no key of a file changes that."""
    spec = _read(tmp_path)
    said = yarn_constants(spec.rope, takes_factors=spec.family.gguf.takes_rope_factors)
    assert said is not None and "truncate true" in said and "the original's are 32, 1 and false" in said
    whole = _read(tmp_path, rope_scaling=_HUB["rope_scaling"] | {"truncate": True})
    assert yarn_constants(whole.rope, takes_factors=whole.family.gguf.takes_rope_factors) is None


def test_what_is_absent_is_as_transformers_has_it(tmp_path: Path) -> None:
    config = {"model_type": "gpt_oss", "num_local_experts": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_spec(tmp_path)
    check_against_transformers(config, tmp_path, spec)
    assert spec.rope.kind is RopeKind.YARN and spec.n_layers == 36
    plain = _read(tmp_path, rope_scaling=..., rope_parameters={"rope_type": "default"})
    assert plain.rope.kind is RopeKind.DEFAULT


def test_llama_cpp_is_told_of_other_orders_of_layers(tmp_path: Path) -> None:
    spec = _read(tmp_path)
    keys = spec.family.gguf.keys(spec)
    assert keys["attention.sliding_window"] == 128 and "attention.sliding_window_pattern" not in keys
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    other = _read(tmp_path, num_hidden_layers=3, layer_types=kinds)
    assert other.family.gguf.keys(other)["attention.sliding_window_pattern"] == (False, True, True)
    assert other.family.edited(other, _HUB)["layer_types"] == kinds


def test_layers_with_a_window_need_its_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_HUB | {"sliding_window": None}))
    with pytest.raises(InputError, match="sliding_window must be a number of tokens"):
        read_spec(tmp_path)


@pytest.mark.parametrize("changes", [{"swiglu_limit": 5.0}, {"swiglu_alpha": 1.5}])
def test_another_function_of_the_experts_is_refused_for_llama_cpp(tmp_path: Path, changes: dict[str, float]) -> None:
    with pytest.raises(UnsupportedError, match=r"gpt-oss graph has swiglu_alpha 1\.702 and swiglu_limit 7\.0 built in"):
        plan_tensors(_read(tmp_path, **changes), "F32")
