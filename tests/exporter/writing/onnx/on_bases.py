"""Students whose experts stand on shared bases, with random adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.sources.adapters import adapter_tensors
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from compressors.model.sources.student import ExpertMap, Student

__all__ = ["student_on_bases"]

_SCALE = 0.1  # of both factors' values: an adapter changes outputs by a tenth


def student_on_bases(folder: Path, base_of: Sequence[int | None], rank: int) -> Student:
    """A student of a checkpoint in which the experts of all layers stand on bases: each base is its first expert."""
    source = Checkpoint(folder)
    bases = SharedBases(tuple(base_of), 1 + max(-1 if base is None else base for base in base_of), rank)
    experts = ExpertMap.identity(source.spec)
    layers = tuple(replace(layer, shared=bases) for layer in experts.layers)
    student = Student(source, replace(experts, layers=layers))
    generator = torch.Generator().manual_seed(0)
    overlay = {}
    for index, layer in enumerate(source.spec.layers):
        assert layer.routed is not None
        for roles in (layer.routed.input_roles, (Role.EXPERT_DOWN,)):
            rows, columns = layer.dimensions(layer.tensor(roles[0]))
            for role in roles:
                for base in range(bases.n_bases):
                    first = source.expert(role, index, bases.members(base)[0])
                    overlay[student.base_name(role, index, base)] = first
            for expert in bases.replaced:
                a_PRI = torch.randn((len(roles), rank, columns), generator=generator)
                b_POR = torch.randn((len(roles), rows, rank), generator=generator)
                first_name = student.name(roles[0], index, expert)
                overlay |= adapter_tensors(first_name, _SCALE * a_PRI, _SCALE * b_POR)
    return student.with_overlay(overlay)
