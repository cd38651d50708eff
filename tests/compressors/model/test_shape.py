"""``config.json`` read once: every family, both generations of keys, and errors by their kind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoConfig

from compressors.model.config.reading import read_spec
from compressors.model.description.mixers import GroupedQuery, QkNorm
from compressors.model.description.roles import Role
from compressors.model.description.rope import Rope, RopeKind
from compressors.model.description.routing import Routing
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families.registry import supported_families
from compressors.model.families.shared.parts import grouped_query, routed_in_mlp

Read = Callable[..., ModelSpec]


@pytest.fixture
def read(family_folder: Path, tmp_path: Path) -> Read:
    """Reads a family's config with some keys changed: ``read(drop=("a key",), another_key=3)``."""
    return _reader(family_folder, tmp_path)


@pytest.fixture
def read_qwen(fine_folder: Path, tmp_path: Path) -> Read:
    return _reader(fine_folder, tmp_path)


@pytest.fixture
def read_mixtral(coarse_folder: Path, tmp_path: Path) -> Read:
    return _reader(coarse_folder, tmp_path)


@pytest.fixture
def read_olmoe(olmoe_folder: Path, tmp_path: Path) -> Read:
    return _reader(olmoe_folder, tmp_path)


def _reader(source: Path, folder: Path) -> Read:
    config: dict[str, Any] = json.loads((source / "config.json").read_text())

    def read(drop: tuple[str, ...] = (), **values: object) -> ModelSpec:
        kept = {key: value for key, value in config.items() if key not in drop}
        (folder / "config.json").write_text(json.dumps(kept | values))
        return read_spec(folder)

    return read


def test_qwen3_moe_is_read(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)
    (layer,) = set(spec.layers)
    assert spec.n_layers == 6
    assert layer.mixer == GroupedQuery(
        n_heads=8,
        n_kv_heads=4,
        head_dim=32,
        rope=Rope(RopeKind.DEFAULT, theta=10000.0, width=32),
        scale=1 / math.sqrt(32),
        qk_norm=QkNorm.PER_HEAD,
    )
    # moe_intermediate_size, not intermediate_size
    routing = Routing(normalizes=True)
    assert layer.feed_forward == routed_in_mlp(32, 4, 128, routing, router_module="mlp.gate")
    assert (spec.model_type, spec.hidden_size, spec.vocab_size) == ("qwen3_moe", 256, 4096)
    assert (spec.context_length, spec.rms_norm_eps, spec.tied_embeddings) == (2048, 1e-6, True)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (0, (0,), 0)


def _normalizes(spec: ModelSpec) -> bool:
    (normalizes,) = {layer.routed.routing.normalizes for layer in spec.layers if layer.routed is not None}
    return normalizes


def test_mixtral_is_read(coarse_folder: Path) -> None:
    spec = read_spec(coarse_folder)
    assert (spec.model_type, spec.n_experts, spec.top_k, spec.expert_width) == ("mixtral", 8, 2, 512)
    assert _normalizes(spec), "Mixtral always normalises"
    assert spec.family is supported_families()["mixtral"]
    assert Role.QUERY_NORM not in spec.layers[0].roles


def test_olmoe_is_read(olmoe_folder: Path) -> None:
    spec = read_spec(olmoe_folder)
    assert (spec.model_type, spec.n_experts, spec.top_k, spec.expert_width) == ("olmoe", 16, 4, 64)
    assert not _normalizes(spec)
    assert not spec.tied_embeddings


def test_query_and_key_norms_are_as_wide_as_the_family_has_them(
    read_qwen: Read, read_mixtral: Read, read_olmoe: Read
) -> None:
    """Nine heads of 32 and three key-value heads, whatever the hidden size."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 32}
    widths = {}
    for read in (read_qwen, read_mixtral, read_olmoe):
        spec = read(**heads)
        norms = [role for role in (Role.QUERY_NORM, Role.KEY_NORM) if role in spec.layers[0].roles]
        widths[spec.model_type] = [spec.dimensions(role, 0) for role in norms]
    assert widths == {"qwen3_moe": [(32,), (32,)], "mixtral": [], "olmoe": [(9 * 32,), (3 * 32,)]}


def test_parameters_are_the_elements_on_disk(family_folder: Path) -> None:
    elements = 0
    for file in family_folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - the reader is not a mapping
                rows = 1
                for length in reader.get_slice(name).get_shape():
                    rows *= length
                elements += rows
    assert read_spec(family_folder).parameters == elements


def test_an_untied_head_counts(read: Read) -> None:
    untied, tied = read(tie_word_embeddings=False), read(tie_word_embeddings=True)
    assert untied.parameters - tied.parameters == 4096 * tied.hidden_size


def test_fewer_experts_have_fewer_parameters(fine_folder: Path) -> None:
    """Per dropped expert three projections of 256 x 128 and one router row, in six layers."""
    spec = read_spec(fine_folder)
    assert spec.parameters - spec.with_experts(20).parameters == 6 * 12 * (3 * 256 * 128 + 256)


def test_what_transformers_5_writes_reads_equal(family_folder: Path, tmp_path: Path) -> None:
    """Its configs say ``dtype``, nest rope_theta, and call most families' expert count ``num_local_experts``."""
    AutoConfig.from_pretrained(family_folder).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_parameters"]["rope_theta"] == 10000.0
    assert "rope_theta" not in written
    assert "torch_dtype" not in written
    assert ("num_local_experts" in written) == (written["model_type"] != "olmoe")
    assert read_spec(tmp_path) == read_spec(family_folder)


def test_a_config_gets_another_expert_count_in_one_spelling(family_folder: Path, tmp_path: Path) -> None:
    AutoConfig.from_pretrained(family_folder).save_pretrained(tmp_path)
    spec = read_spec(family_folder).with_experts(3)
    for folder in (family_folder, tmp_path):
        config = spec.family.edited(spec, json.loads((folder / "config.json").read_text()))
        assert len({"num_experts", "num_local_experts"} & set(config)) == 1
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_spec(tmp_path) == spec
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert (loaded.num_experts, loaded.num_experts_per_tok) == (3, spec.top_k)


def test_nested_rope_theta_is_the_one_that_counts(read: Read) -> None:
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).rope.theta == 5e5
    assert read(drop=("rope_theta",), rope_parameters={"rope_type": "default", "rope_theta": 5e5}).rope.theta == 5e5
    assert read(rope_scaling=None).rope.theta == 10000.0


def test_several_and_no_end_tokens(read: Read) -> None:
    assert read(eos_token_id=[3, 5]).eos_token_ids == (3, 5)
    assert read(eos_token_id=None).eos_token_ids == ()
    assert read(drop=("pad_token_id",)).pad_token_id is None


def test_head_dim_defaults_to_an_even_share(read: Read) -> None:
    spec = read(drop=("head_dim",))
    mixer = grouped_query(spec)
    assert mixer.head_dim == spec.hidden_size // mixer.n_heads == 32


def test_norm_topk_prob_is_obeyed(read_qwen: Read, read_olmoe: Read) -> None:
    assert not _normalizes(read_qwen(norm_topk_prob=False))
    assert _normalizes(read_olmoe(norm_topk_prob=True))
    assert not _normalizes(read_olmoe(drop=("norm_topk_prob",)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "256"),
        ("hidden_size", 256.0),
        ("hidden_size", True),
        ("hidden_size", 0),
        ("num_hidden_layers", -1),
        ("num_experts_per_tok", [2]),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", 0),
        ("rope_theta", "big"),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", "</s>"),
        ("model_type", 3),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "big"}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": -1}),
        ("rope_parameters", "default"),
        ("rope_scaling", ["linear"]),
    ],
)
def test_a_value_of_the_wrong_type_is_named(read: Read, key: str, value: object) -> None:
    named = "rope_parameters.rope_theta" if isinstance(value, dict) else key
    with pytest.raises(InputError, match=rf"config\.json: {named} must be ") as refused:
        read(**{key: value})
    assert not isinstance(refused.value, UnsupportedError)


def test_more_experts_per_token_than_experts_are_refused(read: Read) -> None:
    with pytest.raises(InputError, match="num_experts_per_tok is 33, but there are only"):
        read(num_experts_per_tok=33)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"is_causal": False}, "is_causal is False"),
        ({"is_causal": None}, "is_causal is None"),
        ({"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config: settings of single layers"),
        ({"text_config": {"model_type": "llama"}}, "text_config: a model inside a model"),
        ({"layer_types": ["full_attention"]}, "layer_types must name .* for each of the"),
        ({"layer_types": ["linear_attention"] * 6, "num_hidden_layers": 6}, "layer_types must name"),
        ({"model_type": "jamba"}, "'jamba' is not a supported MoE family; supported are .*mixtral, .*olmoe, qwen2_moe"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(read: Read, values: dict[str, object], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        read(**values)


def test_each_family_s_own_restrictions(read_qwen: Read, read_olmoe: Read) -> None:
    with pytest.raises(UnsupportedError, match=r"mlp_only_layers is \[0\]"):
        read_qwen(mlp_only_layers=[0])
    with pytest.raises(UnsupportedError, match="decoder_sparse_step is 2"):
        read_qwen(decoder_sparse_step=2)
    with pytest.raises(UnsupportedError, match=r"clip_qkv is 8\.0"):
        read_olmoe(clip_qkv=8.0)
    assert read_qwen(mlp_only_layers=None, drop=("decoder_sparse_step",)).n_layers == 6


def test_a_window_shortens_the_context(read_qwen: Read, read_mixtral: Read) -> None:
    """Within it attention sees everything, so up to there the model is the same without it."""
    assert (read_mixtral(sliding_window=512).context_length, read_mixtral(sliding_window=512).window) == (512, 512)
    assert read_mixtral(sliding_window=2048).context_length == read_mixtral(sliding_window=9999).context_length == 2048
    assert (
        read_qwen(sliding_window=512).window is read_qwen(sliding_window=512, use_sliding_window=False).window is None
    )
    assert read_qwen(sliding_window=512, use_sliding_window=True).context_length == 512
    assert read_qwen(use_sliding_window=True).window == 4096, "the default of transformers"
    assert read_qwen(sliding_window=None, use_sliding_window=True).window is None


def test_heads_that_cannot_be_shared_or_turned_are_named(read: Read) -> None:
    with pytest.raises(InputError, match="num_key_value_heads 3 does not divide"):
        read(num_key_value_heads=3, head_dim=32)
    with pytest.raises(InputError, match="heads of 33 values"):
        read(head_dim=33)


def test_a_dense_model_is_told_apart(read_qwen: Read) -> None:
    with pytest.raises(UnsupportedError, match="'qwen3' is a dense model"):
        read_qwen(drop=("num_experts",), model_type="qwen3")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"\xff\xfe"])
def test_a_damaged_config_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(InputError, match=r"config\.json (is not valid JSON|holds no JSON object)"):
        read_spec(tmp_path)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        read_spec(tmp_path)
