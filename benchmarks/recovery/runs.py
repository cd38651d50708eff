"""The runs of the comparison, the most telling first, so that one that is cut off is still useful."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.recovery.arms import ARMS, NONE, ROUTER_KD, SWEEP, Arm
from benchmarks.recovery.students import ALL_EXPERTS_ON, DENSE, EDITED, MERGED, PRUNED, UNCHANGED

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
    blocks_per_step: int
    n_blocks: int  # of the one epoch; 0: nothing is trained
    seed: int  # of the order of the blocks, and of what adapters begin with

    @property
    def file_name(self) -> str:
        """For its result."""
        words = f"{self.model} {self.student} {self.arm} {self.learning_rate:g} {self.blocks_per_step} "
        words += f"{self.n_blocks} {self.seed}"
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
    """The first seed's ladder, the comparison of both models, the other seeds' ladders.

    An arm's learning rates are tried before it. Arms whose teacher is live come last: each takes as long as several
    others.
    """
    runs = [_untaught(model, student) for model in MODELS for student in (UNCHANGED, *KINDS)]
    runs += [_untaught("fine", student) for student in (DENSE, ALL_EXPERTS_ON)]
    first, *others = SEEDS
    runs += _ladder(first, live=False)
    for seed in SEEDS:
        runs += [_taught(model, student, ARMS[ROUTER_KD], SHORT_BLOCKS, seed) for student in KINDS for model in MODELS]
    for seed in others:
        runs += _ladder(seed, live=False)
    return runs + [run for seed in SEEDS for run in _ladder(seed, live=True)]


def _ladder(seed: int, *, live: bool) -> list[Run]:
    return [run for arm in ARMS.values() if arm.name != NONE and arm.is_live == live for run in _arm(arm, seed)]


def _arm(arm: Arm, seed: int) -> list[Run]:
    if seed not in SEEDS[: arm.n_seeds]:
        return []
    taught = _taught("fine", arm.student, arm, LADDER_BLOCKS, seed)
    return [*_sweep(arm), taught] if seed == SEEDS[0] else [taught]


def _sweep(arm: Arm) -> list[Run]:
    return [
        _taught("fine", arm.student, replace(arm, pace=pace), SWEEP_BLOCKS, SEEDS[0])
        for pace in SWEEP.get(arm.name, ())
    ]


def _untaught(model: str, student: str) -> Run:
    return _taught(model, student, ARMS[NONE], 0, 0)


def _taught(model: str, student: str, arm: Arm, n_blocks: int, seed: int) -> Run:
    return Run(model, student, arm.name, arm.pace.learning_rate, arm.pace.blocks_per_step, n_blocks, seed)
