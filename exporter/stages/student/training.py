"""Turns a rung of the recipe into a training that can take steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from compressors.calibration.teacher import TeacherTargets
from compressors.model.running.arithmetic import dtype_of
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.student import Student
from compressors.recover.knowledge_augmentation import KnowledgeAugmentation
from compressors.recover.objectives import Distillation, NextToken, Objective, RouterLogitMatching
from compressors.recover.schedule import Schedule
from compressors.recover.scopes import BlockLength, expert_usage
from compressors.recover.student_aware_router import StudentAwareRouter
from compressors.recover.training import Training
from exporter.file_names import TARGETS
from exporter.planning.recipe import RungChoice
from exporter.planning.recovery import schedule_of, scope_of
from exporter.stages.inputs import memory_limit, own_statistics, teacher_statistics, token_blocks
from exporter.work.stage import StageContext

__all__ = ["training_of"]

_LIVE_TEACHERS: Mapping[str, Callable[..., Objective]] = {"ka": KnowledgeAugmentation, "sar": StudentAwareRouter}


def training_of(
    context: StageContext,
    student: Student,
    rung: RungChoice,
    n_blocks: int,
    learning_rate: float,
    block_length: BlockLength | None = None,
) -> Training:
    """The training of a student by a rung, over this many blocks.

    Args:
        context: the stage's context.
        student: the student to train.
        rung: the rung of the recipe.
        n_blocks: the number of blocks of the calibration text.
        learning_rate: the learning rate, in place of the rung's.
        block_length: block lengths of the student's file; needed where the scales of its blocks are trained.

    Raises:
        InputError: text, targets and student do not fit each other.
        TooLargeError: the training does not fit the memory.
    """
    plan = context.plan
    schedule = replace(schedule_of(plan.recipe.recover, rung, n_blocks), learning_rate=learning_rate)
    return Training(
        student,
        token_blocks(context.work).calibration,
        _objective(context, student, rung, schedule),
        schedule,
        scope=scope_of(rung),
        usage=_usage(context, student),
        block_length=block_length,
        limit=memory_limit(context),
        dtype=dtype_of(plan.recipe.arithmetic),
        device=torch.device(plan.device),
    )


def _objective(context: StageContext, student: Student, rung: RungChoice, schedule: Schedule) -> Objective:
    if rung.loss == "next-token":
        return NextToken()
    if rung.loss == "kd":
        return Distillation(TeacherTargets(context.work.path("calibrate", TARGETS)), student)
    limit, device = memory_limit(context), torch.device(context.plan.device)
    dtype = dtype_of(context.plan.recipe.arithmetic)
    if rung.loss == "router-logits":
        half = replace(limit, n_bytes=limit.n_bytes // 2)  # the student needs room too
        teacher = StreamedModel(Student.teacher(student.source), limit=half, device=device)
        return RouterLogitMatching(teacher, student, dtype)
    return _LIVE_TEACHERS[rung.loss](
        student, schedule, batches_per_round=rung.batches_per_round, limit=limit, dtype=dtype, device=device
    )


def _usage(context: StageContext, student: Student) -> list[torch.Tensor]:
    """The number of calibration tokens that chose each of the student's experts."""
    own = own_statistics(student, context.work)
    if own is not None:
        return expert_usage(own, student.experts.of_itself())
    return expert_usage(teacher_statistics(context.plan, context.work), student.experts)
