"""Types follow the names in files: tensors of different architectures get the same types as from llama-quantize."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import pytest

from compressors.model.description.family import GgufValue
from compressors.quantize import GGMLQuantizationType
from exporter.writing.gguf.container import TensorEntry, aligned, render_header, render_values, string, value_of
from exporter.writing.gguf.mixes import MIXES, MixedModel, is_quantized, mixed_types
from tests.llama_quantize import types_in_a_dry_run

Shapes = Mapping[str, tuple[int, ...]]

_D, _F, _S = 256, 512, 768
_ALL: Mapping[str, GgufValue] = {
    "context_length": 512,
    "embedding_length": _D,
    "feed_forward_length": _S,
    "expert_feed_forward_length": _F,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "vocab_size": 64,
}
_DEEPSEEK: Mapping[str, GgufValue] = {
    "attention.q_lora_rank": 0,
    "attention.kv_lora_rank": 512,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 192,
    "attention.value_length_mla": 128,
    "expert_shared_count": 1,
    "leading_dense_block_count": 1,
}
_DELTA: Mapping[str, GgufValue] = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 128,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 512,
    "attention.recurrent_layers": tuple((layer + 1) % 4 != 0 for layer in range(12)),
}


def _feed_forward(
    blk: str, n_experts: int, *, shared: bool, dense: bool = False
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{blk}ffn_norm.weight", (_D,)
    if dense:
        yield from _three(f"{blk}ffn_", "", (), _S)
        return
    yield f"{blk}ffn_gate_inp.weight", (n_experts, _D)
    yield f"{blk}exp_probs_b.bias", (n_experts,)
    yield from _three(f"{blk}ffn_", "_exps", (n_experts,), _F)
    yield f"{blk}ffn_gate_exps.bias", (n_experts, _F)
    if shared:
        yield f"{blk}ffn_gate_inp_shexp.weight", (1, _D)
        yield from _three(f"{blk}ffn_", "_shexp", (), _S)


def _three(prefix: str, suffix: str, leading: tuple[int, ...], width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part, shape in (("gate", (width, _D)), ("up", (width, _D)), ("down", (_D, width))):
        yield f"{prefix}{part}{suffix}.weight", (*leading, *shape)


def _attention(blk: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{blk}attn_norm.weight", (_D,)
    for part, shape in (("q", (512, _D)), ("k", (128, _D)), ("v", (128, _D)), ("output", (_D, 512))):
        yield f"{blk}attn_{part}.weight", shape
        yield f"{blk}attn_{part}.bias", shape[:1]
    yield f"{blk}attn_sinks.weight", (8,)


def _latent(blk: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{blk}attn_q.weight", (4 * 192, _D)
    yield f"{blk}attn_kv_a_mqa.weight", (576, _D)
    yield f"{blk}attn_kv_a_norm.weight", (512,)
    yield f"{blk}attn_k_b.weight", (4, 512, 128)
    yield f"{blk}attn_v_b.weight", (4, 128, 512)
    yield f"{blk}attn_output.weight", (_D, 512)


def _delta(blk: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{blk}attn_qkv.weight", (1024, _D)
    yield f"{blk}attn_gate.weight", (512, _D)
    yield f"{blk}ssm_conv1d.weight", (1024, 4)
    yield f"{blk}ssm_dt.bias", (4,)
    yield f"{blk}ssm_a", (4,)
    yield f"{blk}ssm_ba.weight", (8, _D)
    yield f"{blk}ssm_norm.weight", (128,)
    yield f"{blk}ssm_out.weight", (_D, 512)


def _deepseek(n_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in range(n_layers):
        yield from _latent(f"blk.{layer}.")
        yield from _feed_forward(f"blk.{layer}.", 16, shared=True, dense=layer == 0)


def _qwen3_next(n_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in range(n_layers):
        yield from (_attention if layer % 4 == 3 else _delta)(f"blk.{layer}.")
        yield from _feed_forward(f"blk.{layer}.", 16, shared=True)


def _usual(n_layers: int, n_experts: int, *, shared: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in range(n_layers):
        yield from _attention(f"blk.{layer}.")
        yield from _feed_forward(f"blk.{layer}.", n_experts, shared=shared)


_MODELS: Mapping[str, tuple[MixedModel, Mapping[str, GgufValue], Shapes]] = {
    "latent attention and a dense layer": (MixedModel("deepseek2", 26, 16, 4, 1), _DEEPSEEK, dict(_deepseek(26))),
    "delta nets": (MixedModel("qwen3next", 12, 16, 8, 2), _DELTA, dict(_qwen3_next(12))),
    "shared experts": (MixedModel("qwen2moe", 24, 60, 8, 8), {}, dict(_usual(24, 60, shared=True))),
    "eight experts and a shared one": (MixedModel("qwen2moe", 16, 8, 8, 2), {}, dict(_usual(16, 8, shared=True))),
    "one expert and a shared one": (MixedModel("qwen2moe", 17, 1, 8, 2), {}, dict(_usual(17, 1, shared=True))),
    "biases and sinks": (
        MixedModel("gpt-oss", 24, 32, 8, 1),
        {"attention.sliding_window": 128},
        dict(_usual(24, 32, shared=False)),
    ),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", _MODELS)
def test_types_are_those_of_llama_quantize(case: str, tied: bool, tmp_path: Path) -> None:
    model, keys, in_layers = _MODELS[case]
    outside = {"token_embd.weight": (64, _D), "output_norm.weight": (_D,)}
    shapes = {**outside, **({} if tied else {"output.weight": (64, _D)}), **in_layers}
    _write_header(tmp_path / "x.gguf", model, keys, shapes)
    for mix in MIXES.values():
        theirs = types_in_a_dry_run(tmp_path / "x.gguf", mix.file_type)
        ours = {name: ggml_type.name for name, ggml_type in mixed_types(mix, shapes, model).items()}
        assert ours == theirs, mix.name


def _write_header(path: Path, model: MixedModel, keys: Mapping[str, GgufValue], shapes: Shapes) -> None:
    """A float32 file whose weights are holes."""
    counts: dict[str, GgufValue] = {
        "block_count": model.n_layers,
        "expert_count": model.n_experts,
        "expert_used_count": 1,
        "attention.head_count": model.n_heads,
        "attention.head_count_kv": model.n_kv_heads,
    }
    described = {f"{model.architecture}.{key}": value_of(value) for key, value in {**_ALL, **counts, **keys}.items()}
    metadata = {"general.architecture": string(model.architecture), **described}
    entries = [TensorEntry(name, shape, GGMLQuantizationType.F32, 4 * prod(shape)) for name, shape in shapes.items()]
    header = render_header(len(metadata), render_values(metadata), entries)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(aligned(entry.n_bytes) for entry in entries))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.ffn_gate_inp.weight", (16, 256)),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, 256)),
        ("blk.0.ssm_conv1d.weight", (1024, 4)),
        ("blk.0.ssm_norm.weight", (8, 512)),
        ("blk.0.ffn_gate_exps.bias", (16, 256)),
        ("blk.0.ssm_a", (48, 1)),
        ("blk.0.attn_sinks.weight", (8,)),
    ],
)
def test_small_tensors_are_never_quantized(name: str, shape: tuple[int, ...]) -> None:
    assert not is_quantized(name, shape)
    types = mixed_types(MIXES["F16"], {name: shape, "output.weight": (64, 256)}, MixedModel("qwen3next", 4, 16, 8, 2))
    assert [types[name].name, types["output.weight"].name] == ["F32", "F16"]
