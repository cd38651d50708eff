"""Quantized checkpoints: float8 with a scale per block is read to transformers' numbers, all others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
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

_EXPERT_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
_QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Path:
    """One layer of the Qwen3-MoE: hidden size 256, experts 128 wide."""
    return toy_checkpoint(tmp_path_factory.mktemp("plain"), n_layers=1)


@pytest.fixture
def fp8(one_layer: Path, to_fp8: Callable[..., Path], tmp_path: Path) -> Path:
    """The same in float8, to be damaged."""
    return to_fp8(one_layer, tmp_path / "fp8")


def _edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def _all_tensors(checkpoint: Checkpoint) -> dict[tuple[Role, int | None, int | None], torch.Tensor]:
    tensors: dict[tuple[Role, int | None, int | None], torch.Tensor] = {}
    for described, layer in checkpoint.spec.places:
        role = described.role
        if described.is_per_expert:
            tensors |= {(role, 0, e): checkpoint.expert(role, 0, e) for e in range(checkpoint.spec.n_experts)}
        else:
            tensors[role, layer, None] = checkpoint.tensor(role, layer)
    return tensors


def test_weights_are_those_that_transformers_dequantizes(fp8: Path) -> None:
    checkpoint = Checkpoint(fp8)
    theirs = AutoModelForCausalLM.from_pretrained(
        fp8, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).state_dict()
    gate_up, down = (theirs[f"model.layers.0.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    width = checkpoint.spec.expert_width
    for (role, layer, expert), tensor in _all_tensors(checkpoint).items():
        if expert is None:
            name = checkpoint.spec.tensor(role, layer).name.format(layer=layer)
            wanted = theirs["model.embed_tokens.weight" if role is Role.HEAD else name]
        elif role is Role.EXPERT_DOWN:
            wanted = down[expert]
        else:
            wanted = gate_up[expert][:width] if role is Role.EXPERT_GATE else gate_up[expert][width:]
        assert tensor.dtype == wanted.dtype == torch.bfloat16
        assert torch.equal(tensor, wanted), (role, expert)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(128, 128), (96, 80), (1, 256), (1000, 1000)])
def test_the_last_blocks_may_be_smaller(
    one_layer: Path, to_fp8: Callable[..., Path], tmp_path: Path, block: tuple[int, int], scale_dtype: torch.dtype
) -> None:
    """Against the same numbers, computed at once; sizes are no multiples of 96, 80 and 1000."""
    folder = to_fp8(one_layer, tmp_path / "fp8", tmp_path / "plain", block, scale_dtype)
    found, wanted = _all_tensors(Checkpoint(folder)), _all_tensors(Checkpoint(tmp_path / "plain"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_fused_experts_have_blocks_that_span_gate_and_up(
    one_layer: Path, to_fp8: Callable[..., Path], tmp_path: Path
) -> None:
    """Blocks of 96 rows: the second one holds the gate's last 32 rows and the first 64 of up."""
    fused = tmp_path / "fused"
    fused.mkdir()
    for file in one_layer.iterdir():
        (fused / file.name).write_bytes(file.read_bytes())
    _edit_tensors(fused, _fuse)
    folder = to_fp8(fused, tmp_path / "fp8", tmp_path / "plain", (96, 80))
    found, wanted = _all_tensors(Checkpoint(folder)), _all_tensors(Checkpoint(tmp_path / "plain"))
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


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
    assert str(checkpoint.block_scaled) == "FP8, block 128x128"


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
        (lambda t: t.pop(f"{_QUERY}_scale_inv"), f"{_QUERY} is float8, but its scales {_QUERY}_scale_inv are in none"),
        (lambda t: t.update({f"{_QUERY}_scale_inv": torch.ones(1, 7)}), r"its scales .* have \[1, 7\]"),
        (lambda t: t.update({f"{_QUERY}_scale_inv": torch.tensor(1.0)}), r"its scales .* have \[\]"),
        (
            lambda t: t.update({f"{_QUERY}_scale_inv": t[f"{_QUERY}_scale_inv"].to(torch.uint8)}),
            "_scale_inv holds U8; only scales in F32, BF16, F16",
        ),
        (lambda t: t.update({_QUERY: t[_QUERY].bfloat16()}), "has dtype BF16, but scales for float8"),
        (
            lambda t: t.update({_QUERY: t[_QUERY].float().to(torch.float8_e5m2)}),
            "has dtype F8_E5M2; only F32, F16, BF16, and F8_E4M3 with scales of blocks",
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
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "quant_method compressed-tensors"),
        ({"quant_method": "mxfp4"}, "quant_method mxfp4"),
        ({"quant_method": "fbgemm_fp8"}, "quant_method fbgemm_fp8"),
        ({"quant_method": "new\n" * 5000}, r"quant_method new\\n"),
        ({"quant_method": ["gptq"]}, r"quant_method \['gptq'\]"),
        ({}, "names no quant_method"),
        ([], r"quantization_config is \[\]"),
        ({"quant_method": "fp8", "weight_block_size": None}, "one scale per tensor: weight_block_size is null"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size \[0, 128\]"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme static"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt e5m2"),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "text_config"])
def test_other_quantized_checkpoints_are_refused_before_their_tensors(
    one_layer: Path, tmp_path: Path, key: str, settings: Any, said: str
) -> None:
    """One sentence with a next step; not even the weight file need be there."""
    (tmp_path / "config.json").write_bytes((one_layer / "config.json").read_bytes())
    inside = {"quantization_config": settings} if key == "text_config" else settings
    _edit_config(tmp_path, **{key: inside})
    with pytest.raises(UnsupportedError, match=rf"quantization_config says .*{said}.*base_model of its model card"):
        Checkpoint(tmp_path)


def test_a_head_in_float8_beside_tied_embeddings(fp8: Path) -> None:
    """It counts if its values are others; its scales are looked at like any tensor's."""
    head = torch.ones(4096, 256).to(torch.float8_e4m3fn)
    _edit_tensors(fp8, lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.raises(
        InputError, match=r"lm_head\.weight is float8, but its scales lm_head\.weight_scale_inv are in none"
    ):
        Checkpoint(fp8)
    _edit_tensors(fp8, lambda tensors: tensors.update({"lm_head.weight_scale_inv": torch.full((32, 2), 0.5)}))
    assert torch.equal(Checkpoint(fp8).tensor(Role.HEAD), torch.full((4096, 256), 0.5, dtype=torch.bfloat16))


def test_float8_without_a_word_in_config_json_is_refused(fp8: Path) -> None:
    _edit_config(fp8, quantization_config=None)
    with pytest.raises(InputError, match=r"quantized already.*though config.json has no quantization_config"):
        Checkpoint(fp8)
