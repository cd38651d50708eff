"""The trained models and small checkpoints cut out of them are what the tests assume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from compressors.model.description.roles import Role
from compressors.model.sources.opening import open_source


def test_the_latent_model_has_the_documented_size(latent_folder: Path, fine_folder: Path) -> None:
    source = open_source(latent_folder)
    assert [layer.n_experts for layer in source.spec.layers] == [0, 32, 32, 32]
    assert source.tensor(Role.SELECTION_BIAS, 1).dtype == torch.float32
    assert source.n_bytes < 8_000_000
    assert (latent_folder / "tokenizer.json").read_bytes() == (fine_folder / "tokenizer.json").read_bytes()


def test_the_models_have_the_documented_size(fine_folder: Path, coarse_folder: Path, olmoe_folder: Path) -> None:
    fine, coarse, olmoe = open_source(fine_folder), open_source(coarse_folder), open_source(olmoe_folder)
    assert (fine.spec.n_layers, fine.spec.n_experts, fine.spec.top_k, len(fine.files)) == (6, 32, 4, 1)
    assert (coarse.spec.n_layers, coarse.spec.n_experts, coarse.spec.top_k, len(coarse.files)) == (6, 8, 2, 3)
    assert (olmoe.spec.n_layers, olmoe.spec.n_experts, olmoe.spec.top_k, len(olmoe.files)) == (3, 16, 4, 1)
    assert all(file.stat().st_size < 20_000_000 for file in coarse.files)


def test_the_models_share_a_tokenizer(fine_folder: Path, family_folder: Path) -> None:
    assert (family_folder / "tokenizer.json").read_bytes() == (fine_folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("model", ["fine", "coarse", "olmoe"])
def test_a_toy_checkpoint_has_the_first_layers_of_its_model(
    model: str, tmp_path: Path, toy_checkpoint: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    source = open_source(request.getfixturevalue(f"{model}_folder"))
    toy = open_source(toy_checkpoint(tmp_path, n_layers=2, model=model))
    assert toy.spec.n_layers == 2
    assert not any("layers.2." in name for name in toy.headers)
    for layer in range(2):
        assert torch.equal(toy.tensor(Role.ROUTER, layer), source.tensor(Role.ROUTER, layer))


def test_the_trained_model_predicts_held_out_text(family_folder: Path, heldout_tokens: npt.NDArray[np.int64]) -> None:
    """Far below the 8.3 nats of a uniform guess: the files hold trained weights, read by stock transformers."""
    model = AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float32, local_files_only=True)
    tokens_BT = torch.from_numpy(heldout_tokens[: 2 * 256]).view(2, 256)
    with torch.no_grad():
        loss = model(tokens_BT, labels=tokens_BT).loss.item()
    assert loss < 5
