"""What a GGUF file holds, decided from the shape alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compressors.model.config import read_shape
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families import Role
from compressors.quantize import GGMLQuantizationType
from exporter.gguf.layout import PRESETS, plan_tensors


def test_presets_go_from_large_to_small_experts(coarse_folder: Path) -> None:
    shape = read_shape(coarse_folder)
    sizes = [
        sum(tensor.n_bytes for tensor in plan_tensors(shape, preset) if tensor.role.is_expert) for preset in PRESETS
    ]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_routers_and_norms_are_float32(family_folder: Path, preset: str) -> None:
    for tensor in plan_tensors(read_shape(family_folder), preset):
        if tensor.role is Role.ROUTER or "norm" in tensor.role.value:
            assert tensor.ggml_type is GGMLQuantizationType.F32


def test_experts_of_a_layer_are_one_tensor(fine_folder: Path) -> None:
    tensors = {tensor.name: tensor for tensor in plan_tensors(read_shape(fine_folder).with_experts(7), "Q4_K")}
    assert tensors["blk.5.ffn_gate_exps.weight"].shape == (7, 128, 256)
    assert tensors["blk.5.ffn_down_exps.weight"].shape == (7, 256, 128)
    assert tensors["blk.5.ffn_gate_inp.weight"].shape == (7, 256)
    assert tensors["blk.5.ffn_gate_exps.weight"].ggml_type is GGMLQuantizationType.Q4_K
    # rows of 128 values are no multiple of 256
    assert tensors["blk.5.ffn_down_exps.weight"].ggml_type is GGMLQuantizationType.Q5_0
    assert tensors["token_embd.weight"].ggml_type is GGMLQuantizationType.Q6_K
    assert "output.weight" not in tensors  # tied to the embedding


def test_an_untied_head_is_written(fine_folder: Path) -> None:
    shape = replace(read_shape(fine_folder), tied_embeddings=False)
    head = next(tensor for tensor in plan_tensors(shape, "Q4_0") if tensor.role is Role.HEAD)
    assert (head.name, head.shape) == ("output.weight", (4096, 256))
    assert head.ggml_type is GGMLQuantizationType.Q8_0


def test_what_llama_cpp_cannot_run_is_refused(fine_folder: Path) -> None:
    shape = read_shape(fine_folder)
    with pytest.raises(UnsupportedError, match="always normalises"):
        plan_tensors(replace(shape, normalize_top_k=False), "Q8_0")
    with pytest.raises(UnsupportedError, match="at most 1024 experts"):
        plan_tensors(shape.with_experts(1025), "Q8_0")
    with pytest.raises(InputError, match="Q3_X: no such type; choose one of F32, BF16, Q8_0"):
        plan_tensors(shape, "Q3_X")
    with pytest.raises(UnsupportedError, match="rows of 100 values"):
        plan_tensors(replace(shape, expert_width=100), "Q4_K")


def test_what_llama_cpp_s_olmoe_cannot_run_is_refused(olmoe_folder: Path) -> None:
    shape = read_shape(olmoe_folder)
    with pytest.raises(UnsupportedError, match="olmoe graph never normalises"):
        plan_tensors(replace(shape, normalize_top_k=True), "Q8_0")
    for wrong in (replace(shape, n_kv_heads=2), replace(shape, head_dim=16)):
        with pytest.raises(UnsupportedError, match="queries and keys as wide as the hidden size"):
            plan_tensors(wrong, "Q8_0")
    with pytest.raises(UnsupportedError, match="needs a head of its own"):
        plan_tensors(replace(shape, tied_embeddings=True), "Q8_0")
