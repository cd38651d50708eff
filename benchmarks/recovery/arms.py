"""The arms of the comparison: each trains a student in one way, with the code that the recover stage runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.recovery.layer_local import train_routers_locally
from benchmarks.recovery.students import DENSE, PRUNED
from benchmarks.recovery.unfinished import Unfinished
from compressors.calibration.statistics import LayerStatistics
from compressors.calibration.teacher import TeacherTargets
from compressors.model.predictions.losses import kl_divergence
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.source import Source
from compressors.model.sources.student import Student
from compressors.recover.knowledge_augmentation import KnowledgeAugmentation
from compressors.recover.objectives import Distillation, NextToken, Objective, RouterLogitMatching, Stateless, StepLoss
from compressors.recover.schedule import UPDATES_PER_BATCH, Schedule
from compressors.recover.scopes import Scope, expert_usage
from compressors.recover.student_aware_router import StudentAwareRouter
from compressors.recover.training import Training

__all__ = ["ARMS", "FULL_VOCABULARY", "NONE", "PUBLISHED", "ROUTER_KD", "SWEEP", "Arm", "Knowledge", "Pace"]


@dataclass(frozen=True)
class Knowledge:
    """The inputs of every arm."""

    source: Source
    statistics: Sequence[LayerStatistics]  # the teacher's
    tokens_BT: torch.Tensor  # training text
    targets: TeacherTargets  # of the training text
    limit: MemoryLimit  # for models that should stay in memory; it changes no result
    unfinished: Unfinished  # the run, when it was killed before


@dataclass(frozen=True)
class Pace:
    """How fast: what was chosen, while everything else of the schedule is as published."""

    learning_rate: float
    blocks_per_step: int


Train = Callable[[Knowledge, Student, Schedule], Student]
MakeObjective = Callable[[Knowledge, Student, Schedule], Objective]


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    name: str
    scope: Scope | None  # None: nothing is trained
    pace: Pace
    train: Train
    student: str = PRUNED  # that the ladder teaches so
    updates_per_batch: int = 1
    n_seeds: int = 3
    is_live: bool = False  # the teacher judges what the student writes


def _by(make_objective: MakeObjective, scope: Scope, *, writes: bool = False) -> Train:
    """Trains by an objective; a student that writes texts visits every layer for each token, so its layers stay."""

    def teach(knowledge: Knowledge, student: Student, schedule: Schedule) -> Student:
        usage = expert_usage(knowledge.statistics, student.experts)
        objective = make_objective(knowledge, student, schedule)
        limit = knowledge.limit if writes else None
        training = Training(student, knowledge.tokens_BT, objective, schedule, scope=scope, usage=usage, limit=limit)
        return knowledge.unfinished.train(training)

    return teach


def _layer_local(knowledge: Knowledge, student: Student, schedule: Schedule) -> Student:
    return train_routers_locally(Student.teacher(knowledge.source), student, knowledge.tokens_BT, schedule)


def _distillation(knowledge: Knowledge, student: Student, _schedule: Schedule) -> Objective:
    return Distillation(knowledge.targets, student)


def _next_token(_knowledge: Knowledge, _student: Student, _schedule: Schedule) -> Objective:
    return NextToken()


def _router_logits(knowledge: Knowledge, student: Student, _schedule: Schedule) -> Objective:
    return RouterLogitMatching(StreamedModel(Student.teacher(knowledge.source)), student)


def _augmentation(knowledge: Knowledge, student: Student, schedule: Schedule) -> Objective:
    return KnowledgeAugmentation(student, schedule, batches_per_round=_BATCHES_PER_ROUND, limit=knowledge.limit)


def _aware_router(knowledge: Knowledge, student: Student, schedule: Schedule) -> Objective:
    return StudentAwareRouter(student, schedule, batches_per_round=_BATCHES_PER_ROUND, limit=knowledge.limit)


class FullDistillation(Stateless):
    """The loss that :class:`~compressors.recover.objectives.Distillation` approximates: KL over the full vocabulary.

    The teacher says anew at each step what it thinks of the step's blocks, in float32; nothing is cached.
    """

    def __init__(self, knowledge: Knowledge, _student: Student, _schedule: Schedule) -> None:
        self._teacher = StreamedModel(Student.teacher(knowledge.source))

    @torch.no_grad()
    def _log_probs(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        (hidden,) = self._teacher.stream([TokenGroup(tokens_BT)])
        every = slice(0, tokens_BT.shape[1])
        chunks = self._teacher.logits_in_chunks(hidden, every)
        return torch.cat([torch.log_softmax(logits, dim=-1) for _, logits in chunks])

    def of_step(self, model: StreamedModel, tokens_BT: torch.Tensor, blocks: Sequence[int], n_blocks: int) -> StepLoss:
        """The divergence, averaged over the positions that have a next token."""
        mine_BT = tokens_BT[list(blocks)]
        log_probs = self._log_probs(mine_BT)
        n_tokens = mine_BT.shape[1]
        weights_BT = torch.full(mine_BT.shape, 1.0 / (n_blocks * (n_tokens - 1)))
        weights_BT[:, -1] = 0.0  # after it comes nothing
        weights = weights_BT.flatten()

        def loss(positions: slice, logits_NV: torch.Tensor) -> torch.Tensor:
            return (kl_divergence(log_probs[positions], logits_NV) * weights[positions]).sum()

        return StepLoss(of_logits=loss)


NONE = "none"
PUBLISHED = "router: KD, published rate"
ROUTER_KD = "router: KD"
FULL_VOCABULARY = "router: KD, full vocabulary"

_PUBLISHED_PACE = Pace(5e-5, 8)
_ROUTER_PACE = Pace(3e-3, 2)
_EXPERTS_PACE = Pace(1e-3, 2)
_NEXT_TOKEN_PACE = Pace(5e-4, 2)  # of experts
_ADAPTERS_PACE = Pace(3e-3, 2)
_MATCHING_PACE = Pace(3e-3, 2)
_LOCAL_PACE = Pace(3e-3, 2)
_DENSE_PACE = Pace(1e-3, 2)
_LIVE_PACE = Pace(1e-3, 2)
_BATCHES_PER_ROUND = 40  # 80 texts are written together, token by token

SWEEP: Mapping[str, tuple[Pace, ...]] = {
    ROUTER_KD: (Pace(1e-3, 8), Pace(3e-3, 8), Pace(1e-2, 8), Pace(1e-3, 2), Pace(3e-3, 2), Pace(6e-3, 2)),
    "router + all experts: KD": (Pace(1e-3, 8), Pace(5e-4, 2), Pace(1e-3, 2), Pace(2e-3, 2)),
    "router + all experts: next token": (Pace(2.5e-4, 2), Pace(5e-4, 2), Pace(1e-3, 2), Pace(2e-3, 2)),
    "router + adapters: KD": (Pace(1e-3, 2), Pace(3e-3, 2), Pace(1e-2, 2)),
    "router: logits matched": (Pace(1e-3, 2), Pace(3e-3, 2), Pace(1e-2, 2)),
    "router: layer-local": (Pace(1e-4, 2), Pace(1e-3, 2), Pace(3e-3, 2), Pace(1e-2, 2)),
    "feed-forward: next token": (Pace(1e-3, 2), Pace(3e-3, 2)),
}
"""The rates that were tried, on the selection split; other arms take the rate of their scope."""


def _arms() -> list[Arm]:
    routers, experts = Scope.routers(), Scope.all_experts()
    some, adapters = Scope.most_used(8), Scope.adapters(8)
    by_augmentation, by_aware_router = (_by(make, experts, writes=True) for make in (_augmentation, _aware_router))
    return [
        Arm(NONE, None, Pace(0.0, 0), lambda _knowledge, student, _schedule: student),
        Arm(ROUTER_KD, routers, _ROUTER_PACE, _by(_distillation, routers)),
        Arm("router + all experts: KD", experts, _EXPERTS_PACE, _by(_distillation, experts)),
        Arm("router + all experts: next token", experts, _NEXT_TOKEN_PACE, _by(_next_token, experts)),
        Arm("router + adapters: KD", adapters, _ADAPTERS_PACE, _by(_distillation, adapters)),
        Arm("router + adapters: next token", adapters, _ADAPTERS_PACE, _by(_next_token, adapters)),
        Arm("router + 8 experts: KD", some, _EXPERTS_PACE, _by(_distillation, some)),
        Arm("router + 8 experts: next token", some, _NEXT_TOKEN_PACE, _by(_next_token, some)),
        Arm("router: next token", routers, _ROUTER_PACE, _by(_next_token, routers)),
        Arm("router: logits matched", routers, _MATCHING_PACE, _by(_router_logits, routers)),
        Arm(FULL_VOCABULARY, routers, _ROUTER_PACE, _by(FullDistillation, routers), n_seeds=1),
        Arm("router + all experts: KA", experts, _LIVE_PACE, by_augmentation, PRUNED, UPDATES_PER_BATCH, is_live=True),
        Arm("router + all experts: SAR", experts, _LIVE_PACE, by_aware_router, is_live=True),
        Arm(PUBLISHED, routers, _PUBLISHED_PACE, _by(_distillation, routers), n_seeds=1),
        Arm("router: layer-local", routers, _LOCAL_PACE, _layer_local, n_seeds=1),
        Arm("feed-forward: next token", experts, _DENSE_PACE, _by(_next_token, experts), DENSE, n_seeds=1),
        Arm("feed-forward: KD", experts, _DENSE_PACE, _by(_distillation, experts), DENSE, n_seeds=1),
        Arm("feed-forward: KA", experts, _LIVE_PACE, by_augmentation, DENSE, UPDATES_PER_BATCH, 1, is_live=True),
        Arm("feed-forward: SAR", experts, _LIVE_PACE, by_aware_router, DENSE, n_seeds=1, is_live=True),
    ]


ARMS: Mapping[str, Arm] = {arm.name: arm for arm in _arms()}
"""The arms by name."""
