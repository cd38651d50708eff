"""Teaches the routers once more, beside experts as the written files hold them, and puts them into those files.

All files get the same routers, so that they stay one student, which can be compared across runtimes. What is taught is
kept only if the divergence of the student as it is shipped falls; otherwise the files get the routers that they were
written with, whatever an attempt that was killed has left in them.
"""

from __future__ import annotations

import json

import torch

from compressors.model.families import Role
from compressors.model.gguf_weights import GgufWeights
from compressors.model.onnx_weights import OnnxWeights
from compressors.model.parallel import is_first, wait_for_all
from compressors.model.shape import MoeShape
from compressors.model.student import Student
from compressors.model.weights import WrittenWeights
from exporter.plan import Plan
from exporter.recovery import AFTER_QUANTIZING
from exporter.routers import rewrite_routers
from exporter.stage import StageContext
from exporter.stages.artifacts import StudentFiles, open_student, use_threads
from exporter.stages.onnx import FOLDER as ONNX_FOLDER
from exporter.stages.recover import Ladder
from exporter.stages.schedule import scheduled_blocks
from exporter.work import WorkDirectory

__all__ = ["run"]


def run(context: StageContext) -> None:
    """Writes the routers' overlay if they were kept, and what was tried; changes the routers in the written files."""
    plan, work = context.plan, context.work
    rung = plan.recipe.recover.after_quantizing
    assert rung is not None, "the stage is left out of other plans"
    use_threads(plan)
    recovered = open_student(plan, work, "recover")
    shipped, *_ = written_weights(plan, work, recovered.shape)
    ladder = Ladder(context, _with_routers_of(recovered, recovered.as_written(shipped)))
    result = ladder.climb(0, rung, scheduled_blocks(work)[-1])
    wait_for_all()  # the files are read until here
    if is_first():
        for weights in written_weights(plan, work, recovered.shape):
            rewrite_routers(weights, _routers(ladder.student))
        report = json.dumps([{**result, "rung": AFTER_QUANTIZING}], indent=1)
        StudentFiles(context.output).recovery.write_text(report, encoding="utf-8")


def written_weights(plan: Plan, work: WorkDirectory, shape: MoeShape) -> list[WrittenWeights]:
    """The files that a plan writes, opened; the first is the one that routers are taught with."""
    opened: list[WrittenWeights] = []
    if plan.recipe.gguf is not None:
        (path,) = work.stage("gguf").glob("*.gguf")
        opened.append(GgufWeights(path, shape))
    if plan.recipe.onnx is not None:
        opened.append(OnnxWeights(work.stage("onnx") / ONNX_FOLDER, shape))
    return opened


def _with_routers_of(student: Student, shipped: Student) -> Student:
    """The shipped student with routers that do not depend on what an attempt that was killed left in the file."""
    routers = _routers(student)
    return shipped.with_overlay({shipped.name(Role.ROUTER, layer): router for layer, router in routers.items()})


def _routers(student: Student) -> dict[int, torch.Tensor]:
    """By layer, where it has experts: float32 [E, D]."""
    layers = [layer for layer in range(student.shape.n_layers) if student.shape.layer(layer).has_moe]
    return {layer: student.tensor(Role.ROUTER, layer).float() for layer in layers}
