"""A student whose experts stand on random bases, close enough to the original's to be run."""

from __future__ import annotations

from dataclasses import replace

import torch

from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.sources.adapters import adapter_tensors
from compressors.model.sources.student import ExpertMap, Student

__all__ = ["on_random_bases"]


def on_random_bases(teacher: Student, shared: SharedBases, layer: int) -> Student:
    """The teacher with a layer's experts on bases that are some of its own, and with small random adapters."""
    maps = list(teacher.experts.layers)
    maps[layer] = replace(maps[layer], shared=shared)
    student = Student(teacher.source, ExpertMap(teacher.spec.n_experts, tuple(maps)))
    routed, generator = student.spec.layers[layer].routed, torch.Generator().manual_seed(0)
    assert routed is not None
    overlay = {}
    for roles in (routed.input_roles, (Role.EXPERT_DOWN,)):
        rows, columns = student.spec.dimensions(roles[0], layer)
        for base in range(shared.n_bases):
            for role in roles:
                overlay[student.base_name(role, layer, base)] = teacher.expert(role, layer, base)
        for expert in shared.replaced:
            a_PRI = 0.1 * torch.randn((len(roles), shared.rank, columns), generator=generator)
            b_POR = 0.1 * torch.randn((len(roles), rows, shared.rank), generator=generator)
            overlay |= adapter_tensors(student.name(roles[0], layer, expert), a_PRI, b_POR)
    return student.with_overlay(overlay)
