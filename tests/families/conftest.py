"""Tiny models with random weights, one of each family, as folders like those on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from compressors.model.running.streaming import StreamedModel, TokenGroup
from tests.families.rows import COMMON, ROWS, Row


@pytest.fixture(scope="module", params=sorted(ROWS))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def row(family: str) -> Row:
    """Its row."""
    return ROWS[family]


@pytest.fixture(scope="module")
def folder(family: str, row: Row, fine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the hub's spelling, with the trained models' tokenizer."""
    path = tmp_path_factory.mktemp("families") / family.replace(" ", "-")
    torch.manual_seed(3)
    config = AutoConfig.for_model(family.split()[0], **{**COMMON, **row.sizes})
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _make_lively(stock)
    stock.save_pretrained(path)
    spell_as_the_hub(path / "config.json", row)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(fine_folder / name, path / name)
    return path


@pytest.fixture(scope="module")
def stock(folder: Path) -> nn.Module:
    """The same model in stock transformers, with the eager arithmetic of attention and experts."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    loaded.set_experts_implementation("eager")
    return loaded  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def blocks_BT() -> torch.Tensor:
    """Tokens: two sequences of 48."""
    return torch.randint(1, 4096, (2, 48), generator=torch.Generator().manual_seed(5))


def logits_of(model: StreamedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """The logits of all positions, [B * T, V], as the streamed model computes them."""
    (hidden,) = model.stream([TokenGroup(tokens_BT)])
    chunks = [logits for _, logits in model.logits_in_chunks(hidden, slice(0, tokens_BT.shape[1]))]
    return torch.cat(chunks).detach()


def spell_as_the_hub(path: Path, row: Row) -> None:
    """Changes the settings that the hub's files spell otherwise."""
    config = {**json.loads(path.read_text(encoding="utf-8")), **row.on_the_hub}
    absent = [key for key, value in row.on_the_hub.items() if value is None]
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in absent}, indent=1))


def _make_lively(stock: nn.Module) -> None:
    """Random weights as large as those of a trained model, so that routers decide and nothing is nearly zero."""
    generator = torch.Generator().manual_seed(11)
    for name, tensor in [*stock.named_parameters(), *stock.named_buffers()]:
        if not tensor.is_floating_point() or "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim >= 2:
            tensor.data = noise * (1.5 / tensor.shape[-1] ** 0.5)
        elif "norm" in name:
            tensor.data = tensor.data + 0.2 * noise
        else:
            tensor.data = 0.3 * noise
