"""Tiny gpt-oss models whose experts are in MXFP4, as on the hub, beside the same numbers in bfloat16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = ["edit_tensors", "random_codes", "values_of", "write_both"]

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "sliding_window": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def random_codes(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes from 0 to 15, one a value of a matrix of this shape, and the scale of each 32 of them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, shape, generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 126, (*shape[:-1], shape[-1] // 32), generator=generator, dtype=torch.uint8)
    return codes, scales


def values_of(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers, one by one in Python's floats, as the specification says: float64."""
    factors = [2.0 ** (scale - 127) for scale in scales.flatten().tolist()]
    signed = [_VALUES[code & 7] * (-1 if code & 8 else 1) for code in codes.flatten().tolist()]
    found = [value * factors[place // 32] for place, value in enumerate(signed)]
    return torch.tensor(found, dtype=torch.float64).view(codes.shape)


def write_both(folder: Path, tokenizer: Path) -> tuple[Path, Path]:
    """Writes two checkpoints of the same numbers.

    Args:
        folder: is filled.
        tokenizer: a folder with a tokenizer of 4,096 tokens.

    Returns:
        The one with experts in MXFP4, and the one that transformers saves.
    """
    torch.manual_seed(4)
    plain, packed = folder / "plain", folder / "mxfp4"
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **_SIZES), dtype=torch.bfloat16)
    for parameter in stock.parameters():
        parameter.data = (torch.randn(parameter.shape) * 0.3).to(torch.bfloat16)
    stock.save_pretrained(plain)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, plain / name)
    shutil.copytree(plain, packed)
    codes = {}
    for layer in range(_SIZES["num_hidden_layers"]):
        for number, (name, shape) in enumerate((("gate_up_proj", (8, 192, 64)), ("down_proj", (8, 64, 96)))):
            codes[f"model.layers.{layer}.mlp.experts.{name}"] = random_codes(shape, 2 * layer + number)
    edit_tensors(plain, lambda tensors: tensors.update(_transposed(codes)))
    edit_tensors(packed, lambda tensors: _pack(tensors, codes))
    config = json.loads((packed / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return packed, plain


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


_Codes = dict[str, tuple[torch.Tensor, torch.Tensor]]


def _transposed(codes: _Codes) -> dict[str, torch.Tensor]:
    return {name: values_of(*pair).transpose(1, 2).to(torch.bfloat16).contiguous() for name, pair in codes.items()}


def _pack(tensors: dict[str, torch.Tensor], codes: _Codes) -> None:
    """Puts value 2j into the low half of byte j, and value 2j + 1 into the high one."""
    for name, (values, scales) in codes.items():
        del tensors[name]
        low, high = values[..., ::2], values[..., 1::2]
        tensors[f"{name}_blocks"] = (low | (high << 4)).unflatten(-1, (-1, 16)).contiguous()
        tensors[f"{name}_scales"] = scales
