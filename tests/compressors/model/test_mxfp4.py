"""MXFP4 is read to the numbers that the format means, and turned into ggml's form without loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

from compressors.model.description.roles import Role
from compressors.model.errors import InputError
from compressors.model.files.gguf.ggml import dequantize_rows
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.gguf.mxfp4 import dequantize_mxfp4, ggml_mxfp4_rows
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, Student
from compressors.quantize.kernels import quantize_rows
from tests.mxfp4_checkpoints import edit_tensors, random_codes, values_of, write_both

_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
_BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
_SCALES = "model.layers.1.mlp.experts.down_proj_scales"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, fine_folder: Path) -> tuple[Path, Path]:
    """The same model with experts in MXFP4, and in bfloat16."""
    return write_both(tmp_path_factory.mktemp("mxfp4"), fine_folder)


@pytest.fixture
def damaged(both: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the first, to be damaged."""
    return Path(shutil.copytree(both[0], tmp_path / "damaged"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_and_scale(dtype: torch.dtype) -> None:
    """All pairs of codes, and scales as far as bfloat16's normal numbers go."""
    pairs = torch.arange(256, dtype=torch.uint8)
    blocks_RK16 = pairs.view(2, 8, 16)
    scales_RK = torch.tensor([[3, 100, 120, 126, 127, 128, 150, 251]] * 2, dtype=torch.uint8)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=1).view(2, 256)
    out = torch.empty(2, 256, dtype=dtype)
    dequantize_mxfp4(blocks_RK16, scales_RK, out)
    assert torch.equal(out.double(), values_of(codes, scales_RK))


def test_ggml_reads_the_same_numbers() -> None:
    codes, scales = random_codes((5, 96), seed=1)
    blocks = (codes[:, ::2] | (codes[:, 1::2] << 4)).unflatten(-1, (-1, 16))
    rows_RY = ggml_mxfp4_rows(blocks, scales)
    found = torch.from_numpy(dequantize_rows(rows_RY.numpy(), GGMLQuantizationType.MXFP4, 96))
    assert torch.equal(found.double(), values_of(codes, scales))


def test_ggml_s_kernel_finds_the_numbers_again() -> None:
    """It chooses other scales and zeros, and no other values: rows of narrower experts lose nothing either."""
    codes, scales = random_codes((64, 96), seed=2)
    codes[:32] &= 0b1011  # blocks without the largest magnitudes
    values = values_of(codes, scales).float()
    stored = quantize_rows(values, GGMLQuantizationType.MXFP4, None, name="x")
    assert torch.equal(torch.from_numpy(dequantize_rows(stored, GGMLQuantizationType.MXFP4, 96)), values)


def test_a_checkpoint_is_the_one_in_bfloat16(both: tuple[Path, Path]) -> None:
    packed, plain = map(Checkpoint, both)
    assert packed.spec == plain.spec
    assert (packed.dtype, packed.n_bytes) == (torch.bfloat16, plain.n_bytes)
    assert (packed.stored_as, plain.stored_as) == ("experts in MXFP4", None)
    for layer in range(2):
        for role in _ROLES:
            for expert in range(8):
                found = packed.expert(role, layer, expert)
                assert torch.equal(found, plain.expert(role, layer, expert)) and found.any()
        for tensor in packed.spec.layers[layer].shared_tensors:
            assert torch.equal(packed.tensor(tensor.role, layer), plain.tensor(tensor.role, layer))


def test_weights_are_those_that_transformers_dequantizes(both: tuple[Path, Path]) -> None:
    settings = Mxfp4Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(both[0], quantization_config=settings, dtype=torch.bfloat16)
    checkpoint = Checkpoint(both[0])
    for layer, module in enumerate(theirs.model.layers):
        for expert in range(8):
            gate_up, down = (
                matrices[expert].T for matrices in (module.mlp.experts.gate_up_proj, module.mlp.experts.down_proj)
            )
            for role, wanted in zip(_ROLES, (gate_up[::2], gate_up[1::2], down), strict=True):
                assert torch.equal(checkpoint.expert(role, layer, expert), wanted)


def test_a_student_s_rows_for_ggml_are_its_own_experts(both: tuple[Path, Path]) -> None:
    """Also of a pruned one; of a changed expert, and of a checkpoint in bfloat16, there are none."""
    source = Checkpoint(both[0])
    student = Student(source, ExpertMap.keeping(8, [(5, 2), (7, 0)]))
    for role in _ROLES:
        assert student.stored_types(role, 1) == (GGMLQuantizationType.MXFP4,)
        rows_RY = student.stored_rows(role, 1, 0, slice(None), 1)
        n_values = source.spec.dimensions(role, 1)[1]
        found = torch.from_numpy(dequantize_rows(rows_RY.numpy(), GGMLQuantizationType.MXFP4, n_values))
        assert torch.equal(found, source.expert(role, 1, 0).float())
    changed = student.with_overlay({student.name(Role.EXPERT_UP, 1, 1): torch.zeros(96, 64)})
    assert not changed.stored_types(Role.EXPERT_UP, 1) and not changed.stored_types(Role.EXPERT_UP, 1, 1)
    assert changed.stored_types(Role.EXPERT_UP, 1, 0)
    assert not student.stored_types(Role.QUERY, 1)
    assert not Student.teacher(Checkpoint(both[1])).stored_types(Role.EXPERT_UP, 1)


def test_codes_without_scales_are_named(damaged: Path) -> None:
    edit_tensors(damaged, lambda tensors: tensors.pop(_SCALES))
    with pytest.raises(InputError, match=f"tensor {_SCALES} is in none"):
        Checkpoint(damaged)


def test_scales_of_another_shape_are_named(damaged: Path) -> None:
    edit_tensors(damaged, lambda tensors: tensors.update({_SCALES: tensors[_SCALES][:, 1:].contiguous()}))
    with pytest.raises(InputError, match=rf"{_SCALES} has shape \[8, 63, 3\], but config.json implies \[8, 64, 3\]"):
        Checkpoint(damaged)


@pytest.mark.parametrize("name", [_SCALES, _BLOCKS])
def test_codes_of_another_dtype_are_named(damaged: Path, name: str) -> None:
    edit_tensors(damaged, lambda tensors: tensors.update({name: tensors[name].to(torch.bfloat16)}))
    with pytest.raises(InputError, match=f"{name} has dtype BF16; codes and scales of MXFP4 are U8"):
        Checkpoint(damaged)


def test_codes_without_a_word_in_config_json_are_refused(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    del config["quantization_config"]
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"quantized already.*though config.json has no quantization_config"):
        Checkpoint(damaged)


def test_float8_in_their_place_is_named(damaged: Path) -> None:
    edit_tensors(damaged, lambda tensors: tensors.update({_SCALES: tensors[_SCALES].view(torch.float8_e4m3fn)}))
    with pytest.raises(InputError, match="down_proj_scales has dtype F8_E4M3; codes and scales of MXFP4 are U8"):
        Checkpoint(damaged)


def test_weights_that_are_none_whatever_config_json_says(both: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers reads them too."""
    plain = Path(shutil.copytree(both[1], tmp_path / "plain"))
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    found = Checkpoint(plain)
    assert found.stored_as is None and found.n_bytes == Checkpoint(both[1]).n_bytes
