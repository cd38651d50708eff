"""Quantized checkpoints: float8 with scales is read to the reference formulas' numbers, all others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from compressors.model.description.roles import Role
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import Student
from tests.float8_checkpoints import SCHEMES, Scheme, all_tensors, blocks, compressed_tensors, write_float8

_EXPERT_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
_IN_WORDS = {(None, None): "a scale per matrix", (1, None): "a scale per row"}
_QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Path:
    """One layer of the Qwen3-MoE: hidden size 256, experts 128 wide."""
    return toy_checkpoint(tmp_path_factory.mktemp("plain"), n_layers=1)


@pytest.fixture
def fp8(one_layer: Path, tmp_path: Path) -> Path:
    """The same in float8, to be damaged."""
    return write_float8(one_layer, tmp_path / "fp8")


def _edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def _changed(**settings: object) -> Mapping[str, Any]:
    """Settings of compressed-tensors that differ from readable ones in these."""
    return {**SCHEMES["compressed-tensors, rows"].settings, **settings}


def test_weights_are_those_that_transformers_dequantizes(fp8: Path) -> None:
    checkpoint = Checkpoint(fp8)
    theirs = AutoModelForCausalLM.from_pretrained(
        fp8, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).state_dict()
    gate_up, down = (theirs[f"model.layers.0.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    width = checkpoint.spec.expert_width
    for (role, layer, expert), tensor in all_tensors(checkpoint).items():
        if expert is None:
            name = checkpoint.spec.tensor(role, layer).name.format(layer=layer)
            wanted = theirs["model.embed_tokens.weight" if role is Role.HEAD else name]
        elif role is Role.EXPERT_DOWN:
            wanted = down[expert]
        else:
            wanted = gate_up[expert][:width] if role is Role.EXPERT_GATE else gate_up[expert][width:]
        assert tensor.dtype == wanted.dtype == torch.bfloat16
        assert torch.equal(tensor, wanted), (role, expert)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_form_is_read_to_the_reference_formula(one_layer: Path, tmp_path: Path, name: str) -> None:
    """Against the same numbers, computed at once; sizes are no multiples of 96, 80 and 1000."""
    folder = write_float8(one_layer, tmp_path / "fp8", tmp_path / "plain", SCHEMES[name])
    checkpoint, plain = Checkpoint(folder), Checkpoint(tmp_path / "plain")
    found, wanted = all_tensors(checkpoint), all_tensors(plain)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert (checkpoint.n_bytes, checkpoint.dtype, checkpoint.spec) == (plain.n_bytes, plain.dtype, plain.spec)
    assert checkpoint.identity() != plain.identity()
    n_scales = len(SCHEMES[name].of_activations) * sum(key.endswith("_proj.weight") for key in plain.headers)
    words = "scales with which activations and the cache become float8"
    assert checkpoint.parts_read_past == ({words: n_scales} if n_scales else {})
    assert (
        checkpoint.stored_as
        == f"FP8, {_IN_WORDS.get(SCHEMES[name].block) or 'block {}x{}'.format(*SCHEMES[name].block)}"
    )


@pytest.mark.parametrize("scheme", [blocks((96, 80)), SCHEMES["compressed-tensors, rows"], SCHEMES["AutoFP8"]])
def test_fused_experts_have_the_scales_of_each_expert(one_layer: Path, tmp_path: Path, scheme: Scheme) -> None:
    """Of the blocks of 96 rows the second one holds the gate's last 32 rows and the first 64 of up."""
    fused = tmp_path / "fused"
    fused.mkdir()
    for file in one_layer.iterdir():
        (fused / file.name).write_bytes(file.read_bytes())
    _edit_tensors(fused, _fuse)
    folder = write_float8(fused, tmp_path / "fp8", tmp_path / "plain", scheme)
    found, wanted = all_tensors(Checkpoint(folder)), all_tensors(Checkpoint(tmp_path / "plain"))
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_groups_of_modules_may_share_scales_in_different_ways(one_layer: Path, tmp_path: Path) -> None:
    """llm-compressor's mixed schemes: here attention has a scale per row, and experts have blocks."""
    rows, of_experts = (SCHEMES[f"compressed-tensors, {name}"] for name in ("rows", "blocks"))
    folder, plain = tmp_path / "fp8", tmp_path / "plain"
    write_float8(one_layer, folder, plain, rows, {".mlp.": of_experts})
    groups = {
        name: {**scheme.settings["config_groups"]["group_0"], "format": "float-quantized"}
        for name, scheme in (("attention", rows), ("experts", of_experts))
    }
    _edit_config(folder, quantization_config=_changed(format="mixed-precision", config_groups=groups))
    found, wanted = all_tensors(Checkpoint(folder)), all_tensors(Checkpoint(plain))
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert Checkpoint(folder).stored_as == "FP8, a scale per row and block 96x80"


def _fuse(tensors: dict[str, torch.Tensor]) -> None:
    experts = "model.layers.0.mlp.experts"
    gate, up, down = (
        torch.stack([tensors.pop(f"{experts}.{e}.{name}_proj.weight") for e in range(32)])
        for name in ("gate", "up", "down")
    )
    tensors[f"{experts}.gate_up_proj"] = torch.cat([gate, up], dim=1)
    tensors[f"{experts}.down_proj"] = down


def test_some_rows_are_those_of_the_whole_tensor(fp8: Path) -> None:
    checkpoint = Checkpoint(fp8)
    whole = checkpoint.tensor(Role.ATTENTION_OUTPUT, 0)
    for rows in (slice(0, 1), slice(100, 200), slice(127, 129), slice(255, 256), slice(7, 7)):
        assert torch.equal(checkpoint.rows(Role.ATTENTION_OUTPUT, 0, rows), whole[rows])


def test_sizes_and_dtypes_are_those_of_the_weights(fp8: Path, one_layer: Path) -> None:
    """All that is planned with them: memory, time, file sizes."""
    checkpoint, plain = Checkpoint(fp8), Checkpoint(one_layer)
    assert checkpoint.n_bytes == plain.n_bytes
    assert checkpoint.dtype == torch.bfloat16
    student = Student.teacher(checkpoint)
    assert {student.dtype(role, 0) for role in checkpoint.spec.layers[0].roles if not role.is_expert} == {
        torch.bfloat16
    }
    assert checkpoint.stored_as == "FP8, block 128x128"


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("float16", torch.float16)])
def test_the_dtype_is_the_one_that_config_json_names(fp8: Path, name: str, dtype: torch.dtype) -> None:
    _edit_config(fp8, dtype=name)
    checkpoint = Checkpoint(fp8)
    tensors = load_file(fp8 / "model.safetensors")
    values, scales = tensors[_QUERY].float(), tensors[f"{_QUERY}_scale_inv"]
    factors = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, : values.shape[1]]
    assert checkpoint.dtype == checkpoint.dtype_of(Role.QUERY, 0) == dtype
    assert torch.equal(checkpoint.tensor(Role.QUERY, 0), (values * factors).to(dtype))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop(f"{_QUERY}_scale_inv"),
            f"{_QUERY} is float8, but its scales, {_QUERY}_scale_inv or {_QUERY}_scale, are in none",
        ),
        (lambda t: t.update({f"{_QUERY}_scale_inv": torch.ones(1, 7)}), r"its scales .* have \[1, 7\]"),
        (lambda t: t.update({f"{_QUERY}_scale_inv": torch.tensor(1.0)}), r"its scales .* have \[\]"),
        (
            lambda t: t.update({f"{_QUERY}_scale_inv": t[f"{_QUERY}_scale_inv"].to(torch.uint8)}),
            "_scale_inv holds U8; only scales in F32, BF16, F16, F8_E8M0",
        ),
        (lambda t: t.update({_QUERY: t[_QUERY].bfloat16()}), "has dtype BF16, but scales for float8"),
        (
            lambda t: t.update({_QUERY: t[_QUERY].float().to(torch.float8_e5m2)}),
            "has dtype F8_E5M2; only F32, F16, BF16, and F8_E4M3 with scales",
        ),
    ],
)
def test_scales_that_do_not_fit_are_named(
    fp8: Path, change: Callable[[dict[str, torch.Tensor]], object], said: str
) -> None:
    _edit_tensors(fp8, change)
    with pytest.raises(InputError, match=said):
        Checkpoint(fp8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method gptq"),
        ({"quant_method": "awq"}, "quant_method awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method bitsandbytes"),
        ({"load_in_8bit": True}, "quant_method bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "config_groups None"),
        (_changed(format="pack-quantized"), r"in format pack-quantized \(packed integers\)"),
        (_changed(format="int-quantized"), r"in format int-quantized \(integers\)"),
        (_changed(format="nvfp4-pack-quantized"), r"nvfp4-pack-quantized \(packed 4-bit floats\)"),
        (_changed(format="new"), "in format new"),
        (_changed(format=["x"]), r"in format \['x'\]"),
        (_changed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config in format sparse-24-bitmask"),
        (_changed(transform_config={"config_groups": {}}), "transform_config, whose rotations"),
        (_changed(config_groups={"FP8": ["Linear"]}), r"config_groups FP8: \['Linear'\]"),
        (_changed(config_groups={"a": {"weights": None}}), "of which no group has weights"),
        (compressed_tensors("channel", (1, None), type="int").settings, "with type int"),
        (compressed_tensors("channel", (1, None), num_bits=4).settings, "with num_bits 4"),
        (compressed_tensors("channel", (1, None), symmetric=False).settings, "with symmetric False"),
        (compressed_tensors("tensor_group", (1, 16)).settings, "with strategy tensor_group"),
        (compressed_tensors("block", (1, 16)).settings, "with block_structure None"),
        (compressed_tensors("group", (1, 16)).settings, "with group_size None"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "with quant_algo NVFP4"),
        ({"quant_method": "mxfp4"}, "quant_method mxfp4"),
        ({"quant_method": "fbgemm_fp8"}, "quant_method fbgemm_fp8"),
        ({"quant_method": "new\n" * 5000}, r"quant_method new\\n"),
        ({"quant_method": ["gptq"]}, r"quant_method \['gptq'\]"),
        ({}, "names no quant_method"),
        ([], r"quantization_config is \[\]"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "with expert_dtype fp4"),
        ({"quant_method": "fp8", "scale_fmt": "new"}, "with scale_fmt new"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size \[0, 128\]"),
        ({"quant_method": "fp8", "activation_scheme": "new"}, "activation_scheme new"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt e5m2"),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "text_config"])
def test_other_quantized_checkpoints_are_refused_before_their_tensors(
    one_layer: Path, tmp_path: Path, key: str, settings: Any, said: str
) -> None:
    """One sentence with a next step; not even the weight file need be there."""
    (tmp_path / "config.json").write_bytes((one_layer / "config.json").read_bytes())
    if key == "text_config":  # of a language model inside of more
        _edit_config(tmp_path, model_type="qwen3_5_moe", text_config={"quantization_config": settings})
    else:
        _edit_config(tmp_path, **{key: settings})
    with pytest.raises(UnsupportedError, match=rf"quantization_config says .*{said}.*base_model of its model card"):
        Checkpoint(tmp_path)


def test_a_head_in_float8_beside_tied_embeddings(fp8: Path) -> None:
    """It counts if its values are others; its scales are looked at like any tensor's."""
    head = torch.ones(4096, 256).to(torch.float8_e4m3fn)
    _edit_tensors(fp8, lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.raises(
        InputError,
        match=r"lm_head\.weight is float8, but its scales, lm_head\.weight_scale_inv or .*, are in none",
    ):
        Checkpoint(fp8)
    _edit_tensors(fp8, lambda tensors: tensors.update({"lm_head.weight_scale_inv": torch.full((32, 2), 0.5)}))
    assert torch.equal(Checkpoint(fp8).tensor(Role.HEAD), torch.full((4096, 256), 0.5, dtype=torch.bfloat16))


def test_float8_without_a_word_in_config_json_is_refused(fp8: Path) -> None:
    _edit_config(fp8, quantization_config=None)
    with pytest.raises(InputError, match=r"quantized already.*though config.json has no quantization_config"):
        Checkpoint(fp8)
