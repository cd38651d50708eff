"""The schedule of training: one epoch of AdamW, with linear warm-up and linear decay to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compressors.model.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["RATES_HIDDEN_SIZE", "UPDATES_PER_BATCH", "Schedule"]

UPDATES_PER_BATCH = 2
"""Steps on each batch in a schedule that trains by knowledge augmentation as published, the paper's M."""

RATES_HIDDEN_SIZE = 256
"""The hidden size of the models that learning rates were chosen on (docs/recovery.md).

An Adam step moves each of a row's weights by about the learning rate, so a product moves in proportion to the hidden
size: other models' rates are scaled by its inverse.
"""


@dataclass(frozen=True)
class Schedule:
    """The schedule of the Router KD paper (arXiv 2603.02217); every kind of recovery uses it.

    ``updates_per_batch`` steps in a row use the same blocks: one, unless the objective changes each time.
    ``fade_ratio`` is the part of the steps over which original experts fade out beside those that replace them. So does
    LightMoE (arXiv 2603.12645), by a schedule that is not public; the straight line is ours.
    """

    n_blocks: int
    learning_rate: float
    blocks_per_step: int = 8
    warmup_ratio: float = 0.03
    max_gradient_norm: float = 1.0
    seed: int = 42
    updates_per_batch: int = 1
    fade_ratio: float = 0.0

    PUBLISHED_BLOCKS: ClassVar[int] = 3000

    @classmethod
    def published(cls, n_blocks: int = PUBLISHED_BLOCKS) -> Schedule:
        """The paper's schedule: 3,000 texts of 512 tokens, 2 x 4 texts a step (375 steps), learning rate 5e-5."""
        return cls(n_blocks=n_blocks, learning_rate=5e-5)

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the one epoch; the last may have fewer blocks."""
        return math.ceil(self.n_blocks / self.blocks_per_step) * self.updates_per_batch

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0 ... n_steps - 1."""
        warmup = math.ceil(self.warmup_ratio * self.n_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (self.n_steps - step) / max(1, self.n_steps - warmup)

    def replaced_share_at(self, step: int) -> float:
        """The share of experts that replace original ones in what both put out: 0 at first, 1 after the fade."""
        n_fading = math.ceil(self.fade_ratio * self.n_steps)
        return 1.0 if step >= n_fading else step / n_fading

    def steps(self) -> tuple[torch.Tensor, ...]:
        """The blocks of each step, in an order that the seed decides: int64."""
        import torch

        order = torch.randperm(self.n_blocks, generator=torch.Generator().manual_seed(self.seed))
        batches = torch.split(order, self.blocks_per_step)
        return tuple(batch for batch in batches for _ in range(self.updates_per_batch))

    def check_against(self, tokens_BT: torch.Tensor) -> None:
        """Checks that the text is enough.

        Raises:
            InputError: there are fewer blocks than the schedule needs, or than one step takes.
        """
        n_blocks, n_tokens = tokens_BT.shape
        if self.n_blocks > n_blocks:
            raise InputError(
                f"recovery wants {self.n_blocks} blocks of {n_tokens} tokens, but the calibration text yields "
                f"{n_blocks}: give more text, or a smaller number in the recipe"
            )
        if self.n_blocks < self.blocks_per_step:
            raise InputError(
                f"recovery has {self.n_blocks} blocks of {n_tokens} tokens, but one step takes "
                f"{self.blocks_per_step}: give more text, or fewer blocks per step in the recipe"
            )
