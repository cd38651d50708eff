"""Trains a small Qwen3-MoE from scratch on the bundled calibration text, in about ten minutes on one core.

    python -m benchmarks.third_model FOLDER

Seed, depth, number and width of its experts differ from the trained models that the search was developed on; tokenizer
and text are the same. ``benchmarks.pareto`` measures it.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from benchmarks.training import Training, train

__all__ = ["train_third_model"]

_TRAINING = Training(seed=20261126)
_SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "intermediate_size": 1024,
}


def train_third_model(folder: Path) -> None:
    """Writes the checkpoint in bfloat16, unless it is there; equal seeds give equal weights."""
    train(folder, _TRAINING, _untrained)


def _untrained(n_tokens: int) -> torch.nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=n_tokens,
        tie_word_embeddings=True,
        norm_topk_prob=True,
        output_router_logits=True,  # the loss that balances the experts
        router_aux_loss_coef=0.02,
        max_position_embeddings=2048,
        rope_theta=10_000.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **_SHAPE,
    )
    model: torch.nn.Module = Qwen3MoeForCausalLM._from_config(config, experts_implementation="eager")
    return model


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Trains the model into FOLDER."""
    train_third_model(folder)


if __name__ == "__main__":
    main()
