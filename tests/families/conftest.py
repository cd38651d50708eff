"""Tiny models with random weights, one of each family, as folders like those on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compressors.model.running.streaming import StreamedModel, TokenGroup
from tests.families.checkpoints import write_model
from tests.families.rows import ROWS, Row


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
    write_model(family, row, path, fine_folder)
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
