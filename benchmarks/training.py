"""Trains a small model from scratch on the bundled calibration text, on one core; equal seeds give equal weights."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from compressors.calibration.splits import load_tokenizer
from exporter.hub import bundled_text, resolve_model

__all__ = ["Training", "train"]


@dataclass(frozen=True)
class Training:
    """The length and the pace of a training.

    Attributes:
        seed: the seed of the first weights and of the order of the text.
        sequences: the sequences of a batch.
        length: the tokens of a sequence.
        steps: the number of batches.
        rate: the largest learning rate.
        warm_up: the steps until it is reached.
        least_rate: the share of it that the last step has.
    """

    seed: int
    sequences: int = 4
    length: int = 256
    steps: int = 700
    rate: float = 2e-3
    warm_up: int = 50
    least_rate: float = 0.02

    def share_of_rate(self, step: int) -> float:
        """The learning rate of a step, as a share of the largest: a line up, then half a wave down."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        progress = (step - self.warm_up) / (self.steps - self.warm_up)
        return self.least_rate + (1 - self.least_rate) * (1 + math.cos(math.pi * progress)) / 2


def train(
    folder: Path,
    training: Training,
    untrained: Callable[[int], torch.nn.Module],
    after_step: Callable[[torch.nn.Module, float], None] = lambda _model, _share: None,
) -> None:
    """Writes a checkpoint in bfloat16 with the demo's tokenizer, unless it is there.

    Args:
        folder: the new checkpoint.
        training: says how.
        untrained: gives transformers' model for a number of tokens in the vocabulary.
        after_step: called after each step with the model and the step's share of the learning rate.
    """
    if (folder / "config.json").exists():
        return
    torch.manual_seed(training.seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    source = resolve_model(None)
    model = untrained(len(load_tokenizer(source))).float().train()
    optimizer = _optimizer(model, training.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.share_of_rate)
    for step, tokens_BT in enumerate(_batches(source, training)):
        loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after_step(model, training.share_of_rate(step))
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"step {step} of {training.steps}: loss {loss.item():.3f}", flush=True)
    _save(model, folder, source)


def _save(model: torch.nn.Module, folder: Path, source: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for weight in model.parameters():  # and no buffers: biases of routers would be too coarse
        weight.data = weight.data.bfloat16()
    model.config.dtype = torch.bfloat16  # type: ignore[union-attr, assignment]
    model.save_pretrained(partial)  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, partial)
    partial.rename(folder)


def _optimizer(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW; matrices decay, but not routers and norms."""
    decaying, others = [], []
    for name, weight in model.named_parameters():
        (decaying if weight.ndim > 1 and not name.endswith("gate.weight") else others).append(weight)
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def _batches(source: Path, training: Training) -> Iterator[torch.Tensor]:
    """Batches of sequences of the calibration text, drawn without repetition as long as there are some: int64."""
    tokenizer = load_tokenizer(source)
    texts = [path.read_text(encoding="utf-8") for path in sorted(bundled_text("calibration").glob("*.txt"))]
    ids = torch.tensor([token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)])
    sequences_NT = ids[: len(ids) // training.length * training.length].reshape(-1, training.length)
    order: list[int] = []
    while len(order) < training.steps * training.sequences:
        order += torch.randperm(len(sequences_NT)).tolist()
    for step in range(training.steps):
        yield sequences_NT[order[step * training.sequences : (step + 1) * training.sequences]]
