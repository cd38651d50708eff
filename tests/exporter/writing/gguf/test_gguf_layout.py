"""The contents of a GGUF file, decided from the description alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compressors.model.config.reading import read_spec
from compressors.model.description.roles import Role
from compressors.model.errors import InputError, UnsupportedError
from compressors.quantize import GGMLQuantizationType
from exporter.writing.gguf.layout import Quantization, bits_per_weight, plan_tensors, quantization
from exporter.writing.gguf.mixes import MIXES
from tests.altered import altered


@pytest.mark.parametrize("preset", MIXES)
def test_routers_and_norms_are_float32(family_folder: Path, preset: str) -> None:
    for tensor in plan_tensors(read_spec(family_folder), preset):
        if tensor.role is Role.ROUTER or "norm" in tensor.role.value:
            assert tensor.ggml_type is GGMLQuantizationType.F32


def test_experts_of_a_layer_are_one_tensor(fine_folder: Path) -> None:
    tensors = {tensor.name: tensor for tensor in plan_tensors(read_spec(fine_folder).with_experts(7), "Q4_K_S")}
    assert tensors["blk.5.ffn_gate_exps.weight"].shape == (7, 128, 256)
    assert tensors["blk.5.ffn_down_exps.weight"].shape == (7, 256, 128)
    assert tensors["blk.5.ffn_gate_inp.weight"].shape == (7, 256)
    assert tensors["blk.5.ffn_gate_exps.weight"].ggml_type is GGMLQuantizationType.Q4_K
    # rows of 128 values are no multiple of 256
    assert tensors["blk.5.ffn_down_exps.weight"].ggml_type is GGMLQuantizationType.Q5_0
    assert tensors["token_embd.weight"].ggml_type is GGMLQuantizationType.Q6_K
    assert "output.weight" not in tensors  # tied to the embedding


def test_an_untied_head_is_written(fine_folder: Path) -> None:
    spec = replace(read_spec(fine_folder), tied_embeddings=False)
    head = next(tensor for tensor in plan_tensors(spec, "Q4_0") if tensor.role is Role.HEAD)
    assert (head.name, head.shape) == ("output.weight", (4096, 256))
    assert head.ggml_type is GGMLQuantizationType.Q6_K


def test_what_llama_cpp_cannot_run_is_refused(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)
    with pytest.raises(UnsupportedError, match="always normalises"):
        plan_tensors(altered(spec, normalizes=False), "Q8_0")
    with pytest.raises(UnsupportedError, match="at most 1024 experts"):
        plan_tensors(spec.with_experts(1025), "Q8_0")
    with pytest.raises(InputError, match="Q3_X: no such type; choose one of F32, BF16, F16, Q8_0"):
        plan_tensors(spec, "Q3_X")


def test_what_llama_cpp_s_olmoe_cannot_run_is_refused(olmoe_folder: Path) -> None:
    spec = read_spec(olmoe_folder)
    with pytest.raises(UnsupportedError, match="olmoe graph never normalises"):
        plan_tensors(altered(spec, normalizes=True), "Q8_0")
    for wrong in (altered(spec, n_kv_heads=2), altered(spec, head_dim=16)):
        with pytest.raises(UnsupportedError, match="queries and keys as wide as the hidden size"):
            plan_tensors(wrong, "Q8_0")
    with pytest.raises(UnsupportedError, match="needs a head of its own"):
        plan_tensors(replace(spec, tied_embeddings=True), "Q8_0")


def test_tensors_can_be_given_types_of_their_own(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)
    types = {"blk.0.ffn_down_exps.weight": "Q2_0", "blk.5.attn_v.weight": "Q8_0", "token_embd.weight": "F16"}
    mix = {tensor.name: tensor for tensor in plan_tensors(spec, "IQ2_M")}
    for tensor in plan_tensors(spec, "IQ2_M", types):
        assert tensor == replace(mix[tensor.name], ggml_type=tensor.ggml_type)
        assert tensor.ggml_type.name == types.get(tensor.name, mix[tensor.name].ggml_type.name)
    assert plan_tensors(spec, "IQ2_M", {"output_norm.weight": "F32"}) == tuple(mix.values())


@pytest.mark.parametrize(
    ("name", "type_name", "said"),
    [
        ("blk.6.attn_v.weight", "Q8_0", r"a type is given for blk\.6\.attn_v\.weight, but the model has no tensor"),
        ("output.weight", "Q8_0", r"for output\.weight, but the model has no"),  # tied to the embedding
        (
            "blk.0.attn_v.weight",
            "Q4_K_M",
            r"^blk\.0\.attn_v\.weight: there is no type Q4_K_M; choose one of F32, F16",
        ),
        ("blk.0.attn_v.weight", "I8", r"there is no type I8;"),
        (
            "blk.0.ffn_gate_inp.weight",
            "Q8_0",
            r"^blk\.0\.ffn_gate_inp\.weight cannot be Q8_0: routers",
        ),
        ("output_norm.weight", "BF16", r"^output_norm\.weight cannot be BF16"),
        ("blk.0.ffn_down_exps.weight", "IQ2_XXS", r"rows of 128 values .* blocks of 256; IQ4_NL fits"),
    ],
)
def test_types_that_a_tensor_cannot_have_are_refused(fine_folder: Path, name: str, type_name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan_tensors(read_spec(fine_folder), "Q4_0", {name: type_name})


def test_a_file_of_other_types_than_a_mix_s_is_called_by_its_bits(fine_folder: Path) -> None:
    spec = read_spec(fine_folder)
    assert quantization(spec, "Q4_K") == Quantization("Q4_K_M", 15)
    assert quantization(spec, "Q4_K_M", {"blk.5.attn_v.weight": "Q6_K"}) == Quantization("Q4_K_M", 15)  # as in the mix
    assert quantization(spec, "Q4_K_M", {"blk.5.attn_v.weight": "Q8_0"}) == Quantization("Q5_MIX", 15)
    gate_up = {
        f"blk.{layer}.ffn_{part}_exps.weight": "MXFP4" for layer in range(spec.n_layers) for part in ("gate", "up")
    }
    assert quantization(spec, "F32", gate_up) == Quantization("Q15_MIX", 38)
    tensors = plan_tensors(spec, "F32", gate_up)
    assert 15 < bits_per_weight(tensors) < 16
    assert sum(tensor.n_values for tensor in tensors) == spec.parameters
