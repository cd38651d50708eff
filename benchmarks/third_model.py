"""Trains a small Qwen3-MoE from scratch on the bundled calibration text, in about ten minutes on one core.

    python -m benchmarks.third_model FOLDER

Seed, depth, number and width of its experts differ from the trained models that the search was developed on; tokenizer
and text are the same. ``benchmarks.pareto`` measures it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from compressors.calibration.splits import load_tokenizer
from exporter.hub import bundled_text, resolve_model

__all__ = ["train_third_model"]

_SEED = 20261126
_LENGTH, _SEQUENCES, _STEPS = 256, 4, 700
_RATE, _WARM_UP, _LEAST_RATE = 2e-3, 50, 0.02  # the last is a share
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
    if (folder / "config.json").exists():
        return
    torch.manual_seed(_SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    source = resolve_model(None)
    model = _untrained(source)
    optimizer = _optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _share_of_rate)
    for step, tokens_BT in enumerate(_batches(source)):
        loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"step {step} of {_STEPS}: loss {loss.item():.3f}", flush=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, partial)
    partial.rename(folder)


def _untrained(source: Path) -> torch.nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    vocabulary = len(load_tokenizer(source))
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
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
    return model.float().train()


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW; matrices decay, but not routers and norms."""
    decaying, others = [], []
    for name, weight in model.named_parameters():
        (decaying if weight.ndim > 1 and not name.endswith("gate.weight") else others).append(weight)
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.98), fused=True)


def _share_of_rate(step: int) -> float:
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    progress = (step - _WARM_UP) / (_STEPS - _WARM_UP)
    return _LEAST_RATE + (1 - _LEAST_RATE) * (1 + math.cos(math.pi * progress)) / 2


def _batches(source: Path) -> Iterator[torch.Tensor]:
    """Batches of sequences of the calibration text, drawn without repetition as long as there are some: int64."""
    tokenizer = load_tokenizer(source)
    texts = [path.read_text(encoding="utf-8") for path in sorted(bundled_text("calibration").glob("*.txt"))]
    ids = torch.tensor([token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)])
    sequences_NT = ids[: len(ids) // _LENGTH * _LENGTH].reshape(-1, _LENGTH)
    order: list[int] = []
    while len(order) < _STEPS * _SEQUENCES:
        order += torch.randperm(len(sequences_NT)).tolist()
    for step in range(_STEPS):
        yield sequences_NT[order[step * _SEQUENCES : (step + 1) * _SEQUENCES]]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Trains the model into FOLDER."""
    train_third_model(folder)


if __name__ == "__main__":
    main()
