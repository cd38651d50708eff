"""``config.json`` against ``AutoConfig``: every setting absent, null and otherwise, all ways to write a rotary scaling.

An accepted setting must be the one that transformers computes with, to the last bit; others are refused by name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from compressors.model.config.config_check import check_against_transformers
from compressors.model.config.reading import read_spec
from compressors.model.description.rope import RopeKind
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.json_file import read_json

_TRAINED, _HALF_HEAD = 2048, 16

_KEYS = {
    "hidden_size": (512, "256", 0),
    "num_hidden_layers": (3, 1.5),
    "num_attention_heads": (4, 0),
    "num_key_value_heads": (2, 3),
    "head_dim": (64, 33),
    "num_experts": (16, -1),
    "num_local_experts": (12, "8"),
    "num_experts_per_tok": (1, 99),
    "moe_intermediate_size": (96, []),
    "intermediate_size": (160, True),
    "vocab_size": (5000, 10**12),
    "max_position_embeddings": (333, 0.5),
    "rms_norm_eps": (1e-3, "small"),
    "rope_theta": (5e5, -1.0),
    "tie_word_embeddings": (False, "yes"),
    "norm_topk_prob": (False, 1),
    "hidden_act": ("swish", "gelu"),
    "sliding_window": (128, "wide"),
    "use_sliding_window": (True, 1),
    "max_window_layers": (1,),
    "attention_bias": (False, True),
    "clip_qkv": (8.0,),
    "decoder_sparse_step": (1, 2),
    "mlp_only_layers": ([], [0]),
    "layer_types": (["full_attention"] * 2, ["chunked_attention"] * 2),
    "is_causal": (True, False),
    "partial_rotary_factor": (0.5,),
    "dtype": ("float16",),
    "torch_dtype": ("float32",),
}
_ABSENT = object()

_YARN = {"factor": 4.0, "original_max_position_embeddings": 512}
_SHORT, _LONG = [1.0 + index / 10 for index in range(_HALF_HEAD)], [2.0 + index for index in range(_HALF_HEAD)]
_SCALINGS: tuple[dict[str, Any], ...] = (
    {"rope_type": "default"},
    {"rope_type": "default", "factor": 4.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e5},
    {"rope_type": "linear"},
    {"rope_type": "linear", "factor": None},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "dynamic", "factor": "2"},
    {"rope_type": "yarn", **_YARN},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", **_YARN, "factor": None},
    {"rope_type": "yarn", "original_max_position_embeddings": 512},
    {"rope_type": "yarn", **_YARN, "attention_factor": 1.3},
    {"rope_type": "yarn", **_YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    {"rope_type": "yarn", **_YARN, "mscale": 0.7},
    {"rope_type": "yarn", **_YARN, "beta_fast": 20, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", **_YARN, "beta_fast": None, "finetuned": True},
    {"rope_type": "yarn", **_YARN, "rope_theta": None},
    {"rope_type": "llama3", **_YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", **_YARN, "low_freq_factor": 1.0},
    {"rope_type": "longrope", "short_factor": _SHORT, "long_factor": _LONG, "original_max_position_embeddings": 512},
    {"rope_type": "longrope", "short_factor": _SHORT, "long_factor": _LONG, "factor": 8.0, "attention_factor": 1.2},
    {"rope_type": "longrope", "short_factor": _SHORT[1:], "long_factor": _LONG},
    {"rope_type": "proportional"},
    {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.25},
    {"rope_type": "su", "factor": 2.0},
    {"rope_type": None, "factor": 2.0},
    {"full_attention": {"rope_type": "linear", "factor": 2.0}},
)
_BESIDE = {"rope_type": "default", "rope_theta": 33333.0}
_AT_TOP: tuple[dict[str, Any], ...] = (
    {},
    {"original_max_position_embeddings": 300},
    {"original_max_position_embeddings": None},
    {"rope_theta": 7e4},
)


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    """It warns of most of what is tried here."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity(level)


@pytest.fixture
def config(family_folder: Path) -> dict[str, Any]:
    """A family's config with two layers, and its heads of 32 values written out."""
    settings: dict[str, Any] = json.loads((family_folder / "config.json").read_text())
    del settings["rope_theta"]
    return settings | {"num_hidden_layers": 2, "head_dim": 32, "max_position_embeddings": _TRAINED}


def _write(folder: Path, settings: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def _check(folder: Path, spec: ModelSpec) -> None:
    path = folder / "config.json"
    check_against_transformers(read_json(path), path, spec)


def _runs(folder: Path) -> bool:
    """Whether transformers makes a model of the config."""
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return bool(torch.isfinite(type(model.model.rotary_emb)(config=config).inv_freq).all())
    except Exception:  # each wrong value raises another kind
        return False


@pytest.mark.parametrize("key", _KEYS)
def test_a_setting_is_what_transformers_takes_or_refused_by_name(
    config: dict[str, Any], tmp_path: Path, key: str
) -> None:
    for value in (_ABSENT, None, *_KEYS[key]):
        others = {name: setting for name, setting in config.items() if name != key}
        folder = _write(tmp_path, others if value is _ABSENT else others | {key: value})
        try:
            spec = read_spec(folder)
        except InputError as refused:
            assert key in str(refused) or _follows(key, str(refused)), (value, str(refused))
            continue
        if not _runs(folder):  # strict classes look at keys, too, that their models do not use
            with pytest.raises(UnsupportedError, match=key):
                _check(folder, spec)
            continue
        _check(folder, spec)
        assert spec.tied_embeddings == AutoConfig.from_pretrained(folder).tie_word_embeddings


def _follows(key: str, message: str) -> bool:
    """A value that only another one makes wrong is named with that one."""
    followers = {"num_experts": "num_experts_per_tok", "num_hidden_layers": "layer_types", "head_dim": "heads of"}
    return followers.get(key, key) in message


def test_every_spelling_of_a_scaling_is_read_as_transformers_does(config: dict[str, Any], tmp_path: Path) -> None:
    module = _rotary_module(_write(tmp_path, config))
    n_accepted, kinds = 0, set()
    for settings in _spellings(config):
        folder = _write(tmp_path, settings)
        try:
            spec = read_spec(folder)
        except InputError as refused:
            assert "rope_" in str(refused) or "original_max_position_embeddings" in str(refused)
            continue
        _check_rope(module, AutoConfig.from_pretrained(folder), spec)
        n_accepted += 1
        kinds.add(spec.rope.kind)
    assert kinds == set(RopeKind)
    assert n_accepted > 150


def _spellings(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for scaling, top in itertools.product(_SCALINGS, _AT_TOP):
        older = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
        for written in (scaling,) if top else (scaling, older):
            for names in (
                {"rope_parameters": written},
                {"rope_scaling": written, "rope_parameters": _BESIDE},
                {"rope_parameters": _BESIDE, "rope_scaling": written},
                {"rope_scaling": _BESIDE, "rope_parameters": written},
            ):
                yield config | top | names


def _rotary_module(folder: Path) -> Callable[..., torch.nn.Module]:
    """The class of transformers that makes the family's cosines and sines."""
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).model.rotary_emb)


def _check_rope(module: Callable[..., torch.nn.Module], loaded: PreTrainedConfig, spec: ModelSpec) -> None:
    """Compares at every length that makes a difference, and for which files are written."""
    longest = _TRAINED if spec.rope.kind is RopeKind.DYNAMIC else 2 * _TRAINED
    for n_tokens in (8, 600, longest):
        cosine, _ = module(config=loaded)(torch.zeros(1), torch.arange(n_tokens)[None])
        angles = torch.outer(torch.arange(n_tokens).float(), spec.rope.inverse_frequencies(n_tokens))
        found = torch.cat((angles, angles), dim=-1).cos() * spec.rope.attention_factor
        assert torch.equal(found, cosine[0]), loaded.rope_parameters


def test_what_is_written_out_reads_equal(config: dict[str, Any], tmp_path: Path) -> None:
    for scaling in _SCALINGS:
        try:
            spec = read_spec(_write(tmp_path, config | {"rope_scaling": scaling}))
        except InputError:
            continue
        again = config | {"rope_parameters": spec.rope.in_config(), "rope_scaling": None}
        assert read_spec(_write(tmp_path, again)) == spec


def test_an_unknown_scaling_is_never_to_be_dropped(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"rope_parameters\.type is su; .* so it cannot be left out"):
        read_spec(_write(tmp_path, config | {"rope_parameters": {"type": "su"}}))
    with pytest.raises(InputError, match=r"rope_scaling\.factor"):
        read_spec(_write(tmp_path, config | {"rope_scaling": {"rope_type": "linear"}, "rope_parameters": _BESIDE}))


def test_a_difference_from_transformers_ends_with_the_setting(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks as if another version of transformers had another default."""
    folder = _write(tmp_path, config)
    spec = read_spec(folder)
    loaded: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    loaded.rms_norm_eps = 0.5
    monkeypatch.setattr(type(loaded), "from_dict", lambda *_, **__: loaded)
    with pytest.raises(UnsupportedError, match=r"rms_norm_eps is .*, and 0\.5 as the installed transformers does"):
        _check(folder, spec)
