"""Trains a small GLM-4.7-Flash (``glm4_moe_lite``) from scratch on the bundled calibration text.

    python -m benchmarks.latent.model FOLDER

Its attention is latent; its first layer is dense; a sigmoid scores the experts, beside which each layer has a shared
one. Biases, which the training moves towards equal loads as DeepSeek-V3's does, take part in the choice of experts
alone. So a mistake in any of these shows, which random weights can hide: there, one expert is as good as another.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import torch

from benchmarks.training import Training, train

__all__ = ["train_latent_model"]

_TRAINING = Training(seed=20261127, sequences=8, length=256, steps=1800, rate=4e-3, warm_up=100)
_BIAS_STEP = 0.004
"""The change of a bias after each step of the largest learning rate."""
_SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "intermediate_size": 384,
}


def train_latent_model(folder: Path) -> None:
    """Writes the checkpoint in bfloat16, its biases in float32, unless it is there; equal seeds give equal weights."""
    loads: dict[torch.nn.Module, torch.Tensor] = {}

    def untrained(n_tokens: int) -> torch.nn.Module:
        model = _untrained(n_tokens)
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.register_forward_hook(partial(_count, loads))
        return model

    def balance(_model: torch.nn.Module, share: float) -> None:
        for router, load_E in loads.items():
            router.e_score_correction_bias += share * _BIAS_STEP * torch.sign(load_E.mean() - load_E)

    train(folder, _TRAINING, untrained, balance)


def _untrained(n_tokens: int) -> torch.nn.Module:
    from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

    config = Glm4MoeLiteConfig(
        vocab_size=n_tokens,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **_SHAPE,
    )
    model: torch.nn.Module = Glm4MoeLiteForCausalLM._from_config(config, experts_implementation="eager")
    return model


def _count(
    loads: dict[torch.nn.Module, torch.Tensor],
    router: torch.nn.Module,
    _inputs: tuple[torch.Tensor, ...],
    outputs: tuple[torch.Tensor, ...],
) -> None:
    """Notes how many tokens chose each expert, when a router has run."""
    loads[router] = torch.bincount(outputs[-1].flatten(), minlength=_SHAPE["n_routed_experts"]).float()


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Trains the model into FOLDER."""
    train_latent_model(folder)


if __name__ == "__main__":
    main()
