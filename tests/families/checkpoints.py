"""Writes tiny models with random weights as folders like those on the hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families.rows import COMMON, Row

__all__ = ["add_mtp", "spell_as_the_hub", "write_inside_of_more", "write_model"]

_EXPERT = re.compile(r"(?P<layer>.*\.experts\.)(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")


def write_model(family: str, row: Row, path: Path, tokenizer: Path, **sizes: Any) -> None:
    """Writes a checkpoint in the hub's spelling.

    Args:
        family: the row's name.
        row: says what is special in the model.
        path: the new folder.
        tokenizer: a folder with a tokenizer of as many tokens as the model has, or fewer.
        sizes: settings that go before those of the row.
    """
    torch.manual_seed(3)
    config = AutoConfig.for_model(family.split()[0], **{**COMMON, **row.sizes, **sizes})
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _make_lively(stock)
    stock.save_pretrained(path)
    spell_as_the_hub(path / "config.json", row)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, path / name)


def write_inside_of_more(alone: Path, path: Path) -> None:
    """Writes the weights of a language model in the spelling of a larger one, whose other parts are with it."""
    shutil.copytree(alone, path, ignore=shutil.ignore_patterns("generation_config.json"))
    inside = json.loads((alone / "config.json").read_text())
    whole_type = str(inside["model_type"]).removesuffix("_text")
    whole = _WHOLE[whole_type]
    inside |= whole.inside
    config: dict[str, Any] = {
        "model_type": whole_type,
        "architectures": [whole.architecture],
        "text_config": {key: value for key, value in inside.items() if key != "architectures"},
        "vision_config": whole.vision,
        "eos_token_id": [0, 1],
        "tie_word_embeddings": inside["tie_word_embeddings"],
    }
    (path / "config.json").write_text(json.dumps(config))
    others = {name: torch.ones(shape) for name, shape in whole.others.items()}
    save_file({**others, **dict(_renamed(path))}, path / "model.safetensors")


@dataclass(frozen=True)
class _Whole:
    """A model that contains a language model.

    Attributes:
        architecture: transformers' class.
        vision: the settings of the part that sees.
        others: some tensors that are not the language model's, with their shapes.
        inside: further settings of the language model.
    """

    architecture: str
    vision: Mapping[str, Any]
    others: Mapping[str, tuple[int, ...]]
    inside: Mapping[str, Any] = field(default_factory=dict)


_WHOLE: Mapping[str, _Whole] = {
    "gemma4": _Whole(
        "Gemma4ForConditionalGeneration",
        {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        {
            "model.vision_tower.encoder.layers.0.input_layernorm.weight": (32,),
            "model.embed_vision.embedding_projection.weight": (64, 32),
        },
    ),
    "qwen3_5_moe": _Whole(
        "Qwen3_5MoeForConditionalGeneration",
        {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32},
        {"model.visual.blocks.0.norm1.weight": (32,), "mtp.fc.weight": (2, 2)},
        {"mtp_num_hidden_layers": 1},
    ),
}


def _renamed(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under the hub's names; the experts of a layer are one tensor, or two."""
    stored = load_file(path / "model.safetensors")
    experts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name, tensor in stored.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            yield name.replace("model.", "model.language_model.", 1), tensor
        else:
            of_layer = experts.setdefault(match["layer"].replace("model.", "model.language_model.", 1), {})
            of_layer.setdefault(match["part"], {})[int(match["expert"])] = tensor
    for layer, parts in experts.items():
        gate, up, down = (torch.stack([parts[part][e] for e in sorted(parts[part])]) for part in ("gate", "up", "down"))
        yield f"{layer}gate_up_proj", torch.cat([gate, up], dim=1)
        yield f"{layer}down_proj", down


def _make_lively(stock: nn.Module) -> None:
    """Random weights as large as those of a trained model, so that routers decide and nothing is nearly zero."""
    generator = torch.Generator().manual_seed(11)
    for name, tensor in [*stock.named_parameters(), *stock.named_buffers()]:
        if not tensor.is_floating_point() or "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim >= 2:
            tensor.data = noise * (1.5 / tensor.shape[-1] ** 0.5)
        elif "norm" in name or "scal" in name:
            tensor.data = tensor.data + 0.2 * noise
        else:
            tensor.data = 0.3 * noise


def spell_as_the_hub(path: Path, row: Row) -> None:
    """Changes the settings that the hub's files spell otherwise."""
    config = {**json.loads(path.read_text(encoding="utf-8")), **row.on_the_hub}
    absent = [key for key, value in row.on_the_hub.items() if value is None]
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in absent}, indent=1))


def add_mtp(folder: Path, *, has_own_tables: bool = True) -> None:
    """Adds a layer that predicts one more token to a checkpoint of a family that has such layers, with random weights.

    It is made of the last layer, which must attend, and of the tensors that the hub's checkpoints have beside it.

    Args:
        folder: the checkpoint.
        has_own_tables: where the hub's have an embedding and a head of the layer, these differ from the model's.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    n_layers = config["num_hidden_layers"]
    prefix, further, count = _MTP[config["model_type"]]
    path = folder / "model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(17)
    sizes = {"D": config["hidden_size"], "2D": 2 * config["hidden_size"], "V": config["vocab_size"]}
    added = {name.format(n_layers): torch.empty([sizes[axis] for axis in shape]) for name, shape in further.items()}
    for name, tensor in tensors.items():
        if f".layers.{n_layers - 1}." in name:
            added[prefix.format(n_layers) + name.partition(f".layers.{n_layers - 1}.")[2]] = tensor
    for name, tensor in added.items():
        noise = torch.randn(tensor.shape, generator=generator)
        added[name] = noise * (1.5 / tensor.shape[-1] ** 0.5) if tensor.ndim >= 2 else _vector(name, tensor, noise)
    if not has_own_tables:
        tables = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
        added |= {f"{prefix.format(n_layers)}{name}": tensors[of_model].clone() for name, of_model in tables.items()}
    save_file({**tensors, **added}, path)
    if count is not None:
        whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        whole.get("text_config", whole)[count] = 1
        (folder / "config.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")


def _vector(name: str, tensor: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Random values of a norm or of a bias."""
    is_norm = "norm" in name
    center = 0.0 if not is_norm or name.startswith("mtp.") else 1.0  # there 1 + w multiplies
    return center + (0.2 if is_norm else 0.3) * noise


_BEHIND = "model.layers.{}."
_OF_GLM: tuple[str, Mapping[str, tuple[str, ...]], str | None] = (
    _BEHIND,
    {
        f"{_BEHIND}eh_proj.weight": ("D", "2D"),
        f"{_BEHIND}enorm.weight": ("D",),
        f"{_BEHIND}hnorm.weight": ("D",),
        f"{_BEHIND}shared_head.norm.weight": ("D",),
        f"{_BEHIND}shared_head.head.weight": ("V", "D"),
        f"{_BEHIND}embed_tokens.weight": ("V", "D"),
    },
    "num_nextn_predict_layers",
)
_OF_QWEN: Mapping[str, tuple[str, ...]] = {
    "mtp.fc.weight": ("D", "2D"),
    "mtp.norm.weight": ("D",),
    "mtp.pre_fc_norm_embedding.weight": ("D",),
    "mtp.pre_fc_norm_hidden.weight": ("D",),
}
_MTP: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]], str | None]] = {
    "glm4_moe": _OF_GLM,
    "glm4_moe_lite": _OF_GLM,
    "deepseek_v3": _OF_GLM,
    "qwen3_5_moe_text": ("mtp.layers.0.", _OF_QWEN, "mtp_num_hidden_layers"),
    "qwen3_next": ("mtp.layers.0.", _OF_QWEN, None),
}
"""By family: the beginning of the names, the further tensors with their sizes, and the setting of the number."""
