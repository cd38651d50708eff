"""Which runs the comparison takes, the most telling first, so that one that is cut off still tells something."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.recovery.arms import ARMS, NONE, ROUTER_KD, SWEEP_RATES, Arm
from benchmarks.recovery.students import DENSE, EDITED, MERGED, PRUNED, UNCHANGED

__all__ = ["KINDS", "LADDER_BLOCKS", "MODELS", "SEEDS", "SHORT_BLOCKS", "SWEEP_BLOCKS", "Run", "all_runs"]

MODELS = ("fine", "coarse")
LADDER_BLOCKS = 782
"""Blocks of 512 tokens, 400 thousand tokens in all."""

SHORT_BLOCKS = 320
"""164 thousand tokens: for the comparison of both models, and for the statistics that compressing looks at."""

SWEEP_BLOCKS = 160
"""82 thousand tokens: for the choice of learning rates."""

SEEDS = (0, 1, 2)
KINDS = (PRUNED, MERGED, EDITED)


@dataclass(frozen=True)
class Run:
    """One student that one arm teaches."""

    model: str
    student: str
    arm: str
    learning_rate: float
    n_blocks: int  # of the one epoch; 0: nothing is trained
    seed: int  # of the order of the blocks, and of what adapters begin with

    @property
    def file_name(self) -> str:
        """For its result."""
        words = f"{self.model} {self.student} {self.arm} {self.learning_rate:g} {self.n_blocks} {self.seed}"
        return words.replace(":", "").replace(",", "").replace(" ", "-") + ".json"

    @property
    def is_sweep(self) -> bool:
        """Whether it only helps to choose a learning rate; such a run never sees held-out text."""
        return self.n_blocks == SWEEP_BLOCKS

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to train."""
        return self.n_blocks > 0


def all_runs() -> list[Run]:
    """Seed by seed the ladders and the comparison of both models; an arm's learning rates are tried before it."""
    runs = [_untaught(model, student) for model in MODELS for student in (UNCHANGED, *KINDS)]
    runs.append(_untaught("fine", DENSE))
    for seed in SEEDS:
        for arm in ARMS.values():
            if arm.name != NONE:
                runs += _sweep(arm) if seed == SEEDS[0] else []
                runs.append(Run("fine", arm.student, arm.name, arm.learning_rate, LADDER_BLOCKS, seed))
        rate = ARMS[ROUTER_KD].learning_rate
        runs += [Run(model, student, ROUTER_KD, rate, SHORT_BLOCKS, seed) for student in KINDS for model in MODELS]
    return runs


def _sweep(arm: Arm) -> list[Run]:
    rates = SWEEP_RATES.get(arm.name, ())
    return [Run("fine", arm.student, arm.name, rate, SWEEP_BLOCKS, SEEDS[0]) for rate in rates]


def _untaught(model: str, student: str) -> Run:
    return Run(model, student, NONE, 0.0, 0, 0)
